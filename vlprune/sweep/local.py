"""Workers as processes of this machine, which survive a killed worker and end with their parent."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import psutil

from vlprune.execution import Execution, Interrupted
from vlprune.store.lease import Busy
from vlprune.store.record import ERROR, run_directory
from vlprune.sweep.device import device_is_broken
from vlprune.sweep.engine import DISK, Event, Planner, store_error
from vlprune.sweep.job import Job
from vlprune.sweep.options import Options

# (job, how and where, whether the process was asked to stop) -> None, importable by name.
Work = Callable[[Job, Execution, Callable[[], bool]], None]

# One thread a worker: workers are the parallelism, and the numbers do not depend on how many there are.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEVICES = "CUDA_VISIBLE_DEVICES"
GRACE = 30.0  # seconds in which a worker that is asked to stop may store where it was
LOOK = 1.0  # seconds between two looks at processes that say nothing


def local_pool(work: Work, options: Options, execution: Execution, planner: Planner, most: int) -> LocalPool:
    """The worker processes that the options ask for: one a CUDA device, or a core, and no more than so many."""
    devices = planner.devices()
    return LocalPool(work, execution, min(options.jobs or len(devices) or _cores(), most), devices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalPool:
    """Worker processes of this machine, started when they are first needed.

    Args:
        work: does a job.
        execution: how and where, with a store.
        n_workers: number of worker processes.
        devices: names of CUDA devices, as CUDA_VISIBLE_DEVICES has them; each worker sees one of them.
    """

    def __init__(self, work: Work, execution: Execution, n_workers: int, devices: Sequence[str] = ()) -> None:
        self.work, self.execution, self.n_workers, self.devices = work, execution, n_workers, devices
        self.workers: list[_Worker] = []

    def has_room(self) -> bool:
        """Whether a job can be started."""
        return sum(worker.job is not None for worker in self.workers) < self.n_workers

    def busy(self) -> bool:
        """Whether a job runs."""
        return any(worker.job for worker in self.workers)

    def start(self, job: Job) -> None:
        """Gives a job to a worker that is idle, or to a new one."""
        self.workers = [worker for worker in self.workers if worker.job or worker.alive()]
        worker = next((worker for worker in self.workers if worker.job is None), None)
        if worker is None:
            number = min(set(range(self.n_workers)) - {worker.number for worker in self.workers})
            device = self.devices[number % len(self.devices)] if self.devices else None
            worker = _Worker(self.work, self.execution, number, device)
            self.workers.append(worker)
        worker.start(job)

    def news(self) -> Iterator[Event]:
        """What happened to the jobs that run; waits a second where nothing has."""
        running = [worker for worker in self.workers if worker.job]
        # A grandchild may keep the pipe of a dead worker open, so the process is looked at as well.
        readable = wait([worker.connection for worker in running], timeout=LOOK)
        for worker in running:
            if worker.connection in readable or not worker.alive():
                yield worker.news()
            elif worker.is_newly_suspended():
                assert worker.job is not None
                pid = worker.process.pid
                yield Event("warned", worker.job, message=f"its worker is suspended; `kill -CONT {pid}` lets it go on")

    def close(self) -> None:
        """Asks the workers to store where they are and to stop, and waits until they have."""
        for worker in self.workers:
            worker.dismiss()
        for worker in self.workers:
            worker.join()


class _Worker:
    """A worker process and the job it is on; of the workers alive, each has its own number."""

    def __init__(self, work: Work, execution: Execution, number: int, device: str | None) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could not have loaders of its own; it ends with its parent by itself.
        self.process = context.Process(target=_work, args=(theirs, work, execution), daemon=False)
        with child_environment({} if device is None else {DEVICES: device}):
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.began, self.suspended = 0.0, False

    def alive(self) -> bool:
        return self.process.is_alive()

    def is_newly_suspended(self) -> bool:
        """Whether it has been stopped (SIGSTOP) since it was last asked."""
        before = self.suspended
        with suppress(psutil.Error):
            self.suspended = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        return self.suspended and not before

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
        if kind in ("died", "broken"):
            self.connection.close()
            self.join()
            return Event("retried", job, seconds, message or _death(self.process.exitcode))
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
def child_environment(device: Mapping[str, str]) -> Iterator[None]:
    """While inside, processes that are started have one thread each, these variables too, and ignore Ctrl-C."""
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
        said = attempt(job, work, execution, stop)
        stop.looked = False
        with suppress(OSError):  # The parent may be gone.
            connection.send(said)
        if said[0] == "broken":
            return


def _end_with_parent(stop: _Stop) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    stop.ask()
    time.sleep(GRACE)
    os._exit(1)


def _left(error: Exception, store: Path) -> str:
    """How much there is of what was missing."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            return f"; {shutil.disk_usage(store).free / 2**30:.2f} GiB are free in {store}"
    if isinstance(error, MemoryError):
        own, all_ = psutil.Process().memory_info().rss, psutil.virtual_memory()
        return f" out of memory: this process has {own / 2**30:.2f} GiB, {all_.available / 2**30:.2f} GiB are free"
    return ""


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
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def attempt(job: Job, work: Work, execution: Execution, stopping: Callable[[], bool]) -> tuple[str, str]:
    """("finished", "failed", "fatal", "waiting" or "broken", what there is to say) of a job done in this process.

    A process whose device is broken is of no more use.

    The output of this process goes to the log of the job from now on.
    """
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
        message = " ".join(f"{type(error).__name__}: {error}{_left(error, execution.store)}".split())
        if device_is_broken(error):
            traceback.print_exc()
            return "broken", message
        kind = "fatal" if isinstance(error, OSError) and error.errno in DISK else "failed"
        return kind, store_error(message, job, execution.store, traceback.format_exc())
    if job.is_run:
        (run_directory(execution.store, job.name) / ERROR).unlink(missing_ok=True)
    return "finished", ""
