"""Where jobs execute: local worker processes that survive a killed worker and end with their parent."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from vlprune.execution import Execution, Interrupted
from vlprune.store.artifacts import intact, read_note
from vlprune.store.lease import Busy, holder
from vlprune.store.record import ERROR, LOG, run_directory, write_error
from vlprune.sweep.job import Job

# (job, how and where, whether the process was asked to stop) -> None, importable by name.
Work = Callable[[Job, Execution, Callable[[], bool]], None]

# One thread a worker: workers are the parallelism, and the numbers do not depend on how many there are.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEVICES = "CUDA_VISIBLE_DEVICES"
ATTEMPTS = 2
ELSEWHERE = "made by another sweep"
WAIT = 1.0  # seconds until a job is looked at again that somebody else is at work on
ALIKE = 5  # runs in a row that fail with one message, after which a sweep stops
# What fails every run alike: a disk that is full or may not be written to.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
GRACE = 30.0  # seconds in which a worker that is asked to stop may store where it was


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        kind: "started", "finished", "failed", "retried" (its worker died, it will run once more), "waiting" (somebody
            else is at work on it) or "warned".
        job: the job.
        seconds: since it started.
        message: the error or the warning, one line; of a job that waits, who is at work on it; of a finished one,
            ELSEWHERE where another sweep did it.
        fatal: whether what made the job fail will make all others fail.
    """

    kind: Literal["started", "finished", "failed", "retried", "waiting", "warned"]
    job: Job
    seconds: float = 0.0
    message: str = ""
    fatal: bool = False


class Stopped(Exception):
    """A sweep that cannot go on; the message is one line that says why."""


class _Streak:
    """Failures in a row that are all alike."""

    def __init__(self) -> None:
        self.message, self.jobs = "", list[Job]()

    def note(self, event: Event) -> None:
        """Notes how a run ended.

        Raises:
            Stopped: nothing speaks for the other runs to fare better.
        """
        if event.fatal:
            raise Stopped(event.message)
        if not event.job.is_run or event.kind not in ("finished", "failed"):
            return
        if event.kind == "finished" or event.message != self.message:
            self.message, self.jobs = event.message, []
        if event.kind == "failed":
            self.jobs.append(event.job)
        # A method that fails by itself stops no other.
        if len(self.jobs) >= ALIKE and len({job.configs[0].pruning.method for job in self.jobs}) > 1:
            raise Stopped(f"the last {len(self.jobs)} runs failed alike: {self.message}")


def cuda_devices() -> list[str]:
    """The visible CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    number, visible = torch.cuda.device_count(), os.environ.get(DEVICES)
    return (visible.split(",") if visible else [str(i) for i in range(number)])[:number]


def execute(
    jobs: Sequence[Job], work: Work, execution: Execution, n_workers: int, devices: Sequence[str] = ()
) -> Generator[Event, None, None]:
    """The events of jobs in worker processes, as they happen.

    Jobs start in the given order as soon as those that they come after are done. A failed job leaves error.txt in the
    directory of every run that it belongs to, and those fail with it; the others go on. A worker that dies (killed, out
    of memory) costs its job one of two attempts. Closing the generator, or Ctrl-C, asks the workers to store where they
    are and to stop. Of jobs that another sweep is at work on, the others are done first; then it is waited for.

    Args:
        jobs: what a plan has to be done, in its order.
        work: does a job.
        execution: how and where, with a store.
        n_workers: number of worker processes.
        devices: of `cuda_devices`; each worker sees one of them.

    Raises:
        Stopped: the disk is full or may not be written to, or runs of several methods failed alike one after another;
            the workers have stored where they were.
    """
    streak = _Streak()
    pending, done = list(jobs), {name for job in jobs for name in job.after} - {job.name for job in jobs}
    attempts: dict[str, int] = {}
    later: dict[str, float] = {}  # when a job is looked at again that somebody else is at work on
    workers: list[_Worker] = []
    assert execution.store is not None
    try:
        while pending or any(worker.job for worker in workers):
            workers = [worker for worker in workers if worker.job or worker.alive()]
            while sum(worker.job is not None for worker in workers) < n_workers and (
                job := _next(pending, done, later)
            ):
                pending.remove(job)
                if _made(job, execution.store):
                    done.add(job.name)
                    yield Event("finished", job, message=ELSEWHERE)
                    continue
                if others := _others(job, execution.store):
                    new = job.name not in later
                    later[job.name] = time.monotonic() + WAIT
                    pending.append(job)
                    if new:
                        yield Event("waiting", job, message=others)
                    continue
                worker = next((w for w in workers if w.job is None), None)
                if worker is None:
                    number = min(set(range(n_workers)) - {w.number for w in workers})
                    device = devices[number % len(devices)] if devices else None
                    worker = _Worker(work, execution, number, device)
                    workers.append(worker)
                attempts[job.name] = attempts.get(job.name, 0) + 1
                worker.start(job)
                yield Event("started", job)
            if not any(worker.job for worker in workers):
                time.sleep(WAIT / 4)
            for worker in _ready([w for w in workers if w.job]):
                event = worker.news()
                if event.kind == "retried":
                    workers.remove(worker)
                    if attempts[event.job.name] < ATTEMPTS:
                        pending.insert(0, event.job)
                    else:
                        message = f"{event.message}, {ATTEMPTS} times; its output is in {LOG}"
                        event = replace(event, kind="failed", message=_store(message, event.job, execution))
                elif event.kind == "waiting":  # somebody else was quicker
                    attempts[event.job.name] -= 1
                    later[event.job.name] = time.monotonic() + WAIT
                    pending.append(event.job)
                yield event
                streak.note(event)
                if event.kind == "finished":
                    done.add(event.job.name)
                elif event.kind == "failed":
                    for other in _without(event.job, pending):
                        message = f"its {event.job.kind} failed: {event.message}"
                        yield Event("failed", other, message=_store(message, other, execution))
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.join()


def _next(pending: Sequence[Job], done: set[str], later: Mapping[str, float]) -> Job | None:
    """The first job that can start now."""
    now = time.monotonic()
    return next((job for job in pending if done.issuperset(job.after) and later.get(job.name, 0.0) <= now), None)


def _made(job: Job, store: Path) -> bool:
    """Whether all that a job makes is there."""
    files = [store / file for file in job.files]
    if job.is_run:
        return all(map(intact, files))
    return all(file.is_file() and read_note(file) is not None for file in files)


def _others(job: Job, store: Path) -> str:
    """Who else is at work on a job, in words; "" where nobody is."""
    signs = (holder(store / file) for file in job.files)
    return next((sign.holder for sign in signs if sign is not None), "")


def _without(failed: Job, pending: list[Job]) -> list[Job]:
    """The jobs that cannot be done without a failed one, taken out of the pending ones."""
    names, lost = {failed.name}, []
    for job in list(pending):
        if names.intersection(job.after):
            names.add(job.name)
            pending.remove(job)
            lost.append(job)
    return lost


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    # A grandchild may keep the pipe of a dead worker open, so the process is looked at as well.
    readable = wait([worker.connection for worker in workers], timeout=1.0)
    return [worker for worker in workers if worker.connection in readable or not worker.alive()]


class _Worker:
    """A worker process and the job it is on; of the workers alive, each has its own number."""

    def __init__(self, work: Work, execution: Execution, number: int, device: str | None) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could not have loaders of its own; it ends with its parent by itself.
        self.process = context.Process(target=_work, args=(theirs, work, execution), daemon=False)
        with _child_environment({} if device is None else {DEVICES: device}):
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.began = 0.0

    def alive(self) -> bool:
        return self.process.is_alive()

    def start(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        with suppress(OSError):  # It died while idle; the next look at it says so.
            self.connection.send(job)

    def news(self) -> Event:
        assert self.job is not None
        job, seconds = self.job, time.monotonic() - self.began
        try:
            kind, message = self.connection.recv() if self.connection.poll() or self.alive() else ("died", "")
        except (EOFError, OSError):
            kind, message = "died", ""
        if kind == "warned":
            return Event("warned", job, seconds, message)
        self.job = None
        if kind == "fatal":
            return Event("failed", job, seconds, message, fatal=True)
        if kind == "died":
            self.connection.close()
            self.join()
            return Event("retried", job, seconds, _death(self.process.exitcode))
        return Event(kind, job, seconds, message)

    def dismiss(self) -> None:
        self.connection.close()  # An idle worker reads the end of the pipe and returns.
        if self.job is not None:
            self.process.terminate()

    def join(self) -> None:
        self.process.join(timeout=GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"the worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the worker ended with exit code {exitcode}"


@contextmanager
def _child_environment(device: Mapping[str, str]) -> Iterator[None]:
    # Libraries read the number of threads and the devices when they are imported, and a child inherits an ignored
    # Ctrl-C: the parent decides, and a child that is still importing does not print a traceback.
    own = {**dict.fromkeys(THREADS, "1"), **device}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Stop:
    """Whether this worker was asked to stop, by SIGTERM or by the end of its parent.

    A job that looks here from time to time stores where it is and ends; any other ends at once.
    """

    def __init__(self) -> None:
        self.asked = self.looked = False

    def __call__(self) -> bool:
        self.looked = True
        return self.asked

    def ask(self, *_: object) -> None:
        self.asked = True
        if not self.looked:
            os._exit(128 + signal.SIGTERM)


def _work(connection: Connection, work: Work, execution: Execution) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop.ask)
    threading.Thread(target=_end_with_parent, args=(stop,), daemon=True).start()
    logging.getLogger().addHandler(_ToParent(connection))
    # What this project has to say goes to the log of the job, which is where the output goes.
    logging.getLogger("vlprune").setLevel(logging.INFO)
    logging.getLogger("vlprune").addHandler(logging.StreamHandler(sys.stdout))
    while not stop.asked:
        try:
            job = connection.recv()
        except EOFError:
            return
        said = _attempt(job, work, execution, stop)
        stop.looked = False
        with suppress(OSError):  # The parent may be gone.
            connection.send(said)


def _end_with_parent(stop: _Stop) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    stop.ask()
    time.sleep(GRACE)
    os._exit(1)


class _ToParent(logging.Handler):
    """Sends warnings to the parent, which owns the terminal."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one message."""
        with suppress(OSError):
            self.connection.send(("warned", " ".join(record.getMessage().split())))


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _attempt(job: Job, work: Work, execution: Execution, stopping: Callable[[], bool]) -> tuple[str, str]:
    assert execution.store is not None
    try:
        _redirect_output(execution.store / job.log)
        work(job, execution, stopping)
    except Busy as other:
        return "waiting", str(other)
    except Interrupted as stop:
        return "failed", str(stop)
    except Exception as error:
        # Whatever a job raises is the result of that job; the others go on.
        message = " ".join(f"{type(error).__name__}: {error}".split())
        kind = "fatal" if isinstance(error, OSError) and error.errno in DISK else "failed"
        return kind, _store(message, job, execution, traceback.format_exc())
    if job.is_run:
        (run_directory(execution.store, job.name) / ERROR).unlink(missing_ok=True)
    return "finished", ""


def _store(message: str, job: Job, execution: Execution, details: str = "") -> str:
    """The message, with a note where not even error.txt of a run could be written."""
    assert execution.store is not None
    if not job.is_run:
        return message
    try:
        write_error(run_directory(execution.store, job.name), f"{message}\n\n{job}\n{job.configs[0]}\n\n{details}")
    except OSError as error:
        return f"{message} (and error.txt could not be written: {error})"
    return message
