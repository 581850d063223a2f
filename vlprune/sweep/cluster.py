"""Workers as tasks of a Ray cluster, which goes on without a machine that it loses."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vlprune.config import ConfigError
from vlprune.execution import Execution
from vlprune.store.artifacts import intact
from vlprune.store.record import ERROR, run_directory
from vlprune.store.remote import NOWHERE, remote_of
from vlprune.sweep.engine import Event, Planner
from vlprune.sweep.job import Job
from vlprune.sweep.options import Options
from vlprune.sweep.process import GRACE, THREADS, Work, attempt

try:
    import ray
    from ray import exceptions
except ImportError:
    raise ConfigError("--engine ray needs Ray: pip install 'vlprune[ray]'") from None

REACH = 10.0  # seconds in which the head of a cluster answers
LOOK = 1.0  # seconds between two looks at whether a job is to stop


def cluster_pool(work: Work, options: Options, execution: Execution, _planner: Planner, most: int) -> ClusterPool:
    """The workers of the cluster that the options name, no more than so many."""
    assert execution.store is not None
    spill = execution.spill and execution.spill.resolve()
    everywhere = replace(execution, store=execution.store.resolve(), spill=spill)
    return ClusterPool(work, everywhere, options.address, min(options.jobs or most, most))


class ClusterPool:
    """Tasks of a Ray cluster, all of which see one results directory, or each machine its own mirror of one remote.

    Every machine has this version of the project installed. A job that runs a model gets a GPU where the cluster has
    any, others a core. Ray is asked for no more jobs at once than it can run.

    Args:
        work: does a job.
        execution: how and where, with a store that every machine sees under this path, or has its own under this path
            where there is a remote.
        address: of the cluster, as `ray.init` takes it; None: $RAY_ADDRESS, else this machine alone.
        most: the most jobs at once, of as many as the cluster has GPUs, or cores where it has none.
    """

    def __init__(self, work: Work, execution: Execution, address: str | None, most: int) -> None:
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())}") from None
        there = ray.cluster_resources()
        self.gpus = int(there.get("GPU", 0))
        self.n_workers = min(most, self.gpus or int(there.get("CPU", 1)))
        self.work, self.execution = work, execution
        self.flag: Any = ray.remote(num_cpus=0)(_Flag).remote()
        self.jobs: dict[Any, tuple[Job, float]] = {}
        self.deserted = False

    def has_room(self) -> bool:
        """Whether a job can be started."""
        return len(self.jobs) < self.n_workers

    def busy(self) -> bool:
        """Whether a job runs, or waits for a machine."""
        return bool(self.jobs)

    def start(self, job: Job) -> None:
        """Gives a job to the cluster."""
        gpus = 1 if job.runs_model and self.gpus else 0
        task = ray.remote(_do).options(
            num_cpus=1,
            num_gpus=gpus,
            max_retries=0,  # whether a job is done again is the sweep's decision
            runtime_env={"env_vars": dict.fromkeys(THREADS, "1")},
        )
        self.jobs[task.remote(job, self.work, self.execution, self.flag, os.getcwd())] = job, time.monotonic()

    def news(self) -> Iterator[Event]:
        """What happened to the jobs that run; waits a second where nothing has."""
        done, _ = ray.wait(list(self.jobs), num_returns=1, timeout=LOOK)
        deserted = not done and not ray.cluster_resources().get("CPU")
        if deserted and not self.deserted:
            job, _ = next(iter(self.jobs.values()))
            yield Event("warned", job, message="no machine of the cluster is left; the sweep waits for one")
        self.deserted = deserted
        for task in done:
            job, began = self.jobs.pop(task)
            seconds = time.monotonic() - began
            try:
                kind, message, warnings = ray.get(task)
            except (exceptions.NodeDiedError, exceptions.ObjectLostError, exceptions.OwnerDiedError):
                yield Event("lost", job, seconds, "its machine is gone")
                continue
            except exceptions.RayError as error:
                yield Event("retried", job, seconds, f"its worker died: {_first_line(error)}")
                continue
            for warning in warnings:
                yield Event("warned", job, seconds, warning)
            if kind == "finished":
                yield self._finished(job, seconds)
            elif kind in ("failed", "fatal"):
                self._fetch_why(job)
                yield Event("failed", job, seconds, message, fatal=kind == "fatal")
            elif kind == "broken":
                yield Event("retried", job, seconds, message)
            else:
                yield Event(kind, job, seconds, message)

    def _finished(self, job: Job, seconds: float) -> Event:
        """The end of a job, whose record is fetched where it was made on a machine of another mirror."""
        store, remote = self.execution.store, remote_of(self.execution)
        assert store is not None
        message, fatal = "", False
        if job.is_run and remote is not NOWHERE:
            try:
                if not all(intact(store / file) or remote.fetch(store / file) for file in job.files):
                    message = "its record is not at the remote"
                (run_directory(store, job.name) / ERROR).unlink(missing_ok=True)
            except OSError as error:
                message, fatal = str(error), True
        return Event("failed" if message else "finished", job, seconds, message, fatal)

    def _fetch_why(self, job: Job) -> None:
        """Fetches what a job that failed on a machine of another mirror has written, if that can be done."""
        store, remote = self.execution.store, remote_of(self.execution)
        assert store is not None
        with suppress(OSError):
            for path in (store / job.log, *([run_directory(store, job.name) / ERROR] if job.is_run else [])):
                remote.fetch_file(path)

    def close(self) -> None:
        """Asks the jobs to store where they are and to stop, and waits until they have."""
        with suppress(exceptions.RayError):
            ray.get(self.flag.raise_.remote())
            left = list(self.jobs)
            if left:
                _, left = ray.wait(left, num_returns=len(left), timeout=GRACE)
            for task in left:
                ray.cancel(task, force=True)
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Refuses the host:port of a cluster at which nobody listens, which Ray itself tries for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not port.isdecimal() or "/" in host:  # "auto", or the address of a Ray client
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address!r}: {error.strerror or error}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _Flag:
    """Whether jobs are to stop; it goes with the sweep that made it."""

    def __init__(self) -> None:
        self.up = False

    def raise_(self) -> None:
        self.up = True

    def raised(self) -> bool:
        return self.up


class _Kept(logging.Handler):
    """Keeps warnings for the sweep, which owns the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one message."""
        self.messages.append(" ".join(record.getMessage().split()))


def _do(job: Job, work: Work, execution: Execution, flag: Any, directory: str) -> tuple[str, str, list[str]]:
    """What became of a job, in a worker of the cluster: as of `attempt`, with the warnings."""
    os.chdir(directory)  # names of models and data may be relative
    asked, over, kept = threading.Event(), threading.Event(), _Kept()

    def watch() -> None:
        while not over.wait(LOOK):
            try:
                up = ray.get(flag.raised.remote())
            except exceptions.RayError:  # the sweep is gone
                up = True
            if up:
                return asked.set()

    threading.Thread(target=watch, daemon=True).start()
    logging.getLogger().addHandler(kept)
    try:
        kind, message = attempt(job, work, execution, asked.is_set)
    finally:
        over.set()
        logging.getLogger().removeHandler(kept)
    return kind, message, kept.messages
