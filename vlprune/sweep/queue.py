"""Jobs that wait to be done, each until those that it comes after are."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

from vlprune.sweep.job import Job


class Queue:
    """Jobs in an order; what a job comes after and is not among them counts as done.

    Args:
        jobs: the jobs, each after those that it comes after.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = list(jobs)
        self._rank = {job.name: rank for rank, job in enumerate(jobs)}
        self._open = {job.name: {name for name in job.after if name in self._rank} for job in jobs}
        self._readers: dict[str, list[str]] = {}
        for name, before in self._open.items():
            for other in before:
                self._readers.setdefault(other, []).append(name)
        self._ready = [rank for rank, job in enumerate(jobs) if not self._open[job.name]]  # a heap
        self._later: list[tuple[float, int]] = []  # a heap of those that are not to be taken before a time
        self._left = len(self._jobs)

    def __bool__(self) -> bool:
        """Whether jobs wait to be taken."""
        return self._left > 0

    def take(self) -> Job | None:
        """The first job that can start now, which no longer waits; None where none can."""
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappush(self._ready, heapq.heappop(self._later)[1])
        if not self._ready:
            return None
        self._left -= 1
        return self._jobs[heapq.heappop(self._ready)]

    def put_back(self, job: Job, seconds: float = 0.0) -> None:
        """Lets a job wait again, so many seconds at least."""
        self._left += 1
        heapq.heappush(self._later, (time.monotonic() + seconds, self._rank[job.name]))

    def finish(self, job: Job) -> None:
        """Lets those start that waited for a job that is done."""
        for name in self._readers.get(job.name, ()):
            if name in self._open:
                self._open[name].discard(job.name)
                if not self._open[name]:
                    heapq.heappush(self._ready, self._rank[name])

    def give_up(self, job: Job) -> list[Job]:
        """The jobs that cannot be done without one that failed, in their order; they no longer wait."""
        lost, look = set[str](), [job.name]
        while look:
            for name in self._readers.get(look.pop(), ()):
                if name in self._open and name not in lost:
                    lost.add(name)
                    look.append(name)
        for name in lost:
            del self._open[name]
        self._left -= len(lost)
        return [self._jobs[rank] for rank in sorted(self._rank[name] for name in lost)]
