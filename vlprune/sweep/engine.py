"""The order in which jobs are done, and what becomes of each, wherever they are worked on."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from vlprune.config import RunConfig
from vlprune.execution import Execution
from vlprune.store.artifacts import intact
from vlprune.store.identity import Identity
from vlprune.store.lease import holder
from vlprune.store.record import LOG, run_directory, write_error
from vlprune.store.remote import NOWHERE, Remote, remote_of
from vlprune.sweep.job import Job
from vlprune.sweep.options import Options
from vlprune.sweep.plan import Plan, is_stored
from vlprune.sweep.queue import Queue

ATTEMPTS = 2
ELSEWHERE = "made by another sweep"
WAIT = 1.0  # seconds until a job is looked at again that somebody else is at work on
ALIKE = 5  # runs in a row that fail with one message, after which a sweep stops


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        kind: "started", "finished", "failed", "retried" (its worker died, it will run once more), "lost" (its machine
            is gone, it will run again), "waiting" (somebody else is at work on it) or "warned".
        job: the job.
        seconds: since it started.
        message: the error or the warning, one line; of a job that waits, who is at work on it; of a finished one,
            ELSEWHERE where another sweep did it.
        fatal: whether what made the job fail will make all others fail.
    """

    kind: Literal["started", "finished", "failed", "retried", "lost", "waiting", "warned"]
    job: Job
    seconds: float = 0.0
    message: str = ""
    fatal: bool = False


class Planner(Protocol):
    """Knows models, data and code, as `sweep.planner.Planner` does."""

    def plan(self, options: Options) -> tuple[Plan, dict[str, Identity]]:
        """The plan of a sweep, and what the files of its models and data look like."""
        ...

    def check(self, configs: Iterable[RunConfig], *, skip_broken: bool) -> list[str]:
        """The images that are left out of runs; all that the runs need is there."""
        ...

    def devices(self) -> list[str]:
        """The CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
        ...


class Pool(Protocol):
    """Workers, each with one job at a time: processes of this machine, or of many.

    Attributes:
        n_workers: number of jobs that can run at once.
    """

    n_workers: int

    def has_room(self) -> bool:
        """Whether a job can be started."""
        ...

    def busy(self) -> bool:
        """Whether a job runs."""
        ...

    def start(self, job: Job) -> None:
        """Gives a job to a worker."""
        ...

    def news(self) -> Iterable[Event]:
        """What happened to the jobs that run; waits a moment where nothing has. A job whose worker died is "retried".

        The iterator is used up before the next call of any method but `start`.
        """
        ...

    def close(self) -> None:
        """Asks the workers to store where they are and to stop, and waits until they have."""
        ...


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


def execute(jobs: Sequence[Job], pool: Pool, execution: Execution) -> Generator[Event, None, None]:
    """The events of jobs in a pool of workers, as they happen.

    Jobs start in the given order as soon as those that they come after are done. A failed job leaves error.txt in the
    directory of every run that it belongs to, and those fail with it; the others go on. A worker that dies (killed, out
    of memory) or whose device does costs its job one of two attempts. Closing the generator, or Ctrl-C, asks the
    workers to store where they are and to stop. Of jobs that another sweep is at work on, the others are done first;
    then it is waited for.

    Args:
        jobs: what a plan has to be done, in its order.
        pool: the workers; closed at the end.
        execution: how and where, with a store.

    Raises:
        Stopped: the disk is full or may not be written to, or runs of several methods failed alike one after another;
            the workers have stored where they were.
        RemoteError: the remote fails; so have they.
    """
    assert execution.store is not None
    queue, streak, remote = Queue(jobs), _Streak(), remote_of(execution)
    attempts: dict[str, int] = {}
    told: set[str] = set()  # jobs that somebody else was found at work on
    try:
        while queue or pool.busy():
            while pool.has_room() and (job := queue.take()):
                if _made(job, execution.store, remote):
                    queue.finish(job)
                    yield Event("finished", job, message=ELSEWHERE)
                elif others := _others(job, execution.store):
                    queue.put_back(job, WAIT)
                    if job.name not in told:
                        told.add(job.name)
                        yield Event("waiting", job, message=others)
                else:
                    attempts[job.name] = attempts.get(job.name, 0) + 1
                    pool.start(job)
                    yield Event("started", job)
            if not pool.busy():
                time.sleep(WAIT / 4)
                continue
            for event in pool.news():
                job = event.job
                if event.kind == "retried":
                    if attempts[job.name] < ATTEMPTS:
                        queue.put_back(job)
                    else:
                        message = f"{event.message}, {ATTEMPTS} times; its output is in {LOG}"
                        event = replace(event, kind="failed", message=store_error(message, job, execution))
                elif event.kind in ("waiting", "lost"):  # somebody else was quicker, or it is no fault of the job's
                    attempts[job.name] -= 1
                    queue.put_back(job, WAIT)
                yield event
                streak.note(event)
                if event.kind == "finished":
                    queue.finish(job)
                elif event.kind == "failed":
                    for other in queue.give_up(job):
                        message = f"its {job.kind} failed: {event.message}"
                        yield Event("failed", other, message=store_error(message, other, execution))
    finally:
        pool.close()


def _made(job: Job, store: Path, remote: Remote) -> bool:
    """Whether all that a job makes is where all workers find it; the record of a run is here then."""
    files = [store / file for file in job.files]
    if job.is_run:
        return all(remote.has(file) if intact(file) else remote.fetch(file) for file in files)
    return all(map(is_stored if remote is NOWHERE else remote.has, files))


def _others(job: Job, store: Path) -> str:
    """Who else is at work on a job, in words; "" where nobody is."""
    signs = (holder(store / file) for file in job.files)
    return next((sign.holder for sign in signs if sign is not None), "")


def store_error(message: str, job: Job, execution: Execution, details: str = "") -> str:
    """Stores why a run failed; the message, with a note where not even that could be written."""
    if not job.is_run:
        return message
    assert execution.store is not None
    directory = run_directory(execution.store, job.name)
    try:
        path = write_error(directory, f"{message}\n\n{job}\n{job.configs[0]}\n\n{details}")
        remote_of(execution).push_file(path)
    except OSError as error:
        return f"{message} (and error.txt could not be written: {error})"
    return message
