"""Workers as processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait

from vlprune.execution import Execution
from vlprune.sweep.engine import Event, Planner
from vlprune.sweep.job import Job
from vlprune.sweep.options import Options
from vlprune.sweep.process import Work, Worker

# (work, how and where, number of the worker, the CUDA device that it sees) -> the worker.
Hire = Callable[[Work, Execution, int, str | None], Worker]
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
        hire: starts a worker.
    """

    def __init__(
        self,
        work: Work,
        execution: Execution,
        n_workers: int,
        devices: Sequence[str] = (),
        hire: Hire = Worker,
    ) -> None:
        self.work, self.execution, self.n_workers, self.devices, self.hire = work, execution, n_workers, devices, hire
        self.workers: list[Worker] = []

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
            worker = self.hire(self.work, self.execution, number, device)
            self.workers.append(worker)
        worker.start(job)

    def news(self) -> Iterator[Event]:
        """What happened to the jobs that run; waits a second where nothing has."""
        running = [worker for worker in self.workers if worker.job]
        # A grandchild may keep the pipe of a dead worker open, so the process is looked at as well.
        readable = set(wait([each for worker in running for each in worker.connections], timeout=LOOK))
        for worker in running:
            if not readable.isdisjoint(worker.connections) or not worker.alive():
                if (event := worker.news()) is not None:
                    yield event
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
