"""A worker process: what it does with the jobs that it is given, and how it ends with its parent."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from vlprune.execution import Execution, Interrupted
from vlprune.store.atomic import DISK
from vlprune.store.lease import Busy
from vlprune.store.record import ERROR, LOSSES, run_directory
from vlprune.store.remote import RemoteError, remote_of
from vlprune.sweep.device import device_is_broken
from vlprune.sweep.engine import Event, store_error
from vlprune.sweep.job import Job

# (job, how and where, whether the process was asked to stop) -> None, importable by name.
Work = Callable[[Job, Execution, Callable[[], bool]], None]

# One thread a worker: workers are the parallelism, and the numbers do not depend on how many there are.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEVICES = "CUDA_VISIBLE_DEVICES"
GRACE = 30.0  # seconds in which a worker that is asked to stop may store where it was


class Worker:
    """A worker process and the job it is on; of the workers alive, each has its own number.

    Args:
        work: does a job.
        execution: how and where.
        number: its own.
        device: the CUDA device that it sees; None: all.
        environment: further variables of its environment.
        target: what the process calls with its end of a pipe, `work` and `execution`; None: `serve`.
    """

    def __init__(
        self,
        work: Work,
        execution: Execution,
        number: int,
        device: str | None,
        *,
        environment: Mapping[str, str] | None = None,
        target: Callable[[Connection, Work, Execution], None] | None = None,
    ) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could not have loaders of its own; it ends with its parent by itself.
        self.process = context.Process(target=target or serve, args=(theirs, work, execution), daemon=False)
        with child_environment({**(environment or {}), **({} if device is None else {DEVICES: device})}):
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.began, self.suspended = 0.0, False

    @property
    def connections(self) -> list[Connection]:
        """Those that tell when there is news."""
        return [self.connection]

    def alive(self) -> bool:
        """Whether the process can be given jobs."""
        return self.process.is_alive()

    def is_newly_suspended(self) -> bool:
        """Whether it has been stopped (SIGSTOP) since it was last asked."""
        before = self.suspended
        with suppress(psutil.Error):
            self.suspended = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        return self.suspended and not before

    def start(self, job: Job) -> None:
        """Gives the process a job."""
        self.job, self.began = job, time.monotonic()
        with suppress(OSError):  # It died while idle; the next look at it says so.
            self.connection.send(job)

    def said(self) -> tuple[str, Any]:
        """The next message of the process; "died" and how where there is none."""
        with suppress(EOFError, OSError):
            if self.connection.poll() or self.alive():
                return self.connection.recv()
        self.join()
        return "died", death(self.process.exitcode)

    def news(self) -> Event | None:
        """What has happened to the job; None where nothing has."""
        return self.event(*self.said())

    def event(self, kind: str, message: str) -> Event:
        """What a message of the process means for its job, which has ended with it unless it is a warning."""
        assert self.job is not None
        job, seconds = self.job, time.monotonic() - self.began
        if kind == "warned":
            return Event("warned", job, seconds, message)
        self.job = None
        if kind == "fatal":
            return Event("failed", job, seconds, message, fatal=True)
        if kind in ("broken", "died"):
            self.join()
            return Event("retried", job, seconds, message)
        assert kind in ("finished", "failed", "waiting")
        return Event(kind, job, seconds, message)

    def dismiss(self) -> None:
        """Asks the process to end; one that is on a job stores where it is."""
        self.connection.close()  # An idle worker reads the end of the pipe and returns.
        if self.job is not None:
            self.process.terminate()

    def join(self) -> None:
        """Waits for the end of the process, and makes an end of it."""
        self.process.join(timeout=GRACE)
        self.kill()

    def kill(self) -> None:
        """Makes an end of the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def death(exitcode: int | None) -> str:
    """How a process ended, in words."""
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


def serve(connection: Connection, work: Work, execution: Execution) -> None:
    """Does the jobs that come over a connection, one after the other: what a worker process does."""
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
    try:
        return _attempt(job, work, execution, stopping)
    finally:
        _push_log(job, execution)


def _attempt(job: Job, work: Work, execution: Execution, stopping: Callable[[], bool]) -> tuple[str, str]:
    assert execution.store is not None
    error_file = run_directory(execution.store, job.name) / ERROR
    try:
        _redirect_output(execution.store / job.log)
        work(job, execution, stopping)
        if job.is_run:
            error_file.unlink(missing_ok=True)
            remote_of(execution).remove(error_file)
    except Busy as other:
        return "waiting", str(other)
    except Interrupted as stop:
        return "failed", str(stop)
    except Exception as error:
        # Whatever a job raises is the result of that job; the others go on.
        message = " ".join(f"{type(error).__name__}: {error}{_left(error, execution.store)}".split())
        traceback.print_exc()
        if device_is_broken(error):
            return "broken", message
        fatal = isinstance(error, RemoteError) or (isinstance(error, OSError) and error.errno in DISK)
        return "fatal" if fatal else "failed", store_error(message, job, execution, traceback.format_exc())
    return "finished", ""


def _push_log(job: Job, execution: Execution) -> None:
    """Copies what a job has written for people to the remote, if that can be done."""
    assert execution.store is not None
    sys.stdout.flush()
    sys.stderr.flush()
    log = execution.store / job.log
    with suppress(OSError):
        for path in (log, log.with_name(LOSSES)):
            if path.is_file():
                remote_of(execution).push_file(path)
