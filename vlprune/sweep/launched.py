"""`accelerate launch`: a team of worker processes, a device each, that do one job after the other together.

The first of the launched processes plans, prints and starts the team; the others have nothing to do. Devices are used
by the processes of the team alone, since one that met an error, or that waits for one that did, can only be ended: its
job has failed then, and the next one is done by a new team.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from vlprune.config import ConfigError
from vlprune.execution import Execution, Interrupted
from vlprune.sweep.engine import Event, Planner, store_error
from vlprune.sweep.job import Job
from vlprune.sweep.local import Hire, LocalPool
from vlprune.sweep.options import Options
from vlprune.sweep.process import Work, Worker, death, serve

if TYPE_CHECKING:
    from vlprune.stages.stage import Stage

# Ranks wait for the first one while it works alone, which may be long; who waits for the dead is ended by the team.
PATIENCE = timedelta(days=30)
ENDED = ("failed", "fatal", "broken", "died")


def launched_pool(
    work: Work, options: Options, execution: Execution, planner: Planner, _most: int, *, size: int, assist: Work
) -> LocalPool:
    """A team of all launched processes, which does one run after the other.

    Raises:
        ConfigError: options that do not go together with a launcher, or what `team_of` refuses.
    """
    if options.jobs is not None:
        raise ConfigError(f"--jobs {options.jobs} is for several runs at once; launched processes share one run")
    return LocalPool(work, execution, 1, hire=team_of(size, planner.devices(), assist))


def team_of(size: int, devices: Sequence[str], assist: Work) -> Hire:
    """What starts a team of so many processes.

    Args:
        size: number of processes that were launched.
        devices: the visible CUDA devices; none: the team is on the processor.
        assist: what the others do with the stages that the first convenes them to.

    Raises:
        ConfigError: the processes are on several machines, or have too few devices.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if here != size:
        raise ConfigError(
            f"the devices of one run must be those of one machine, and of {size} launched processes {here} are on this "
            "one; start a sweep on each machine: those with one results directory share the runs"
        )
    if devices and len(devices) < size:
        raise ConfigError(
            f"{size} processes were launched, and each needs a CUDA device; there are {len(devices)}: "
            f"{', '.join(devices)}"
        )
    return partial(Team, size=size, assist=assist)


class Team(Worker):
    """Worker processes that do a job together: the first does it, and convenes the others to its joint stages."""

    def __init__(
        self, work: Work, execution: Execution, number: int, device: str | None, *, size: int, assist: Work
    ) -> None:
        # The others read the fine-tuned weights that the first has stored.
        keep = None if execution.keep_weights == "none" else execution.keep_weights
        self.execution = replace(execution, keep_weights=keep)
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        # Theirs is a group of their own, not the launcher's.
        address |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "False"}

        def placed(rank: int) -> dict[str, str]:
            return {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}

        super().__init__(work, self.execution, number, device, environment=placed(0), target=lead)
        self.others = [
            Worker(assist, self.execution, number, device, environment=placed(rank), target=follow)
            for rank in range(1, size)
        ]

    @property
    def connections(self) -> list[Connection]:
        """Those that tell when there is news."""
        return [self.connection, *(other.connection for other in self.others)]

    def alive(self) -> bool:
        """Whether all processes can be given jobs."""
        return super().alive() and all(other.alive() for other in self.others)

    def said(self) -> tuple[str, Any]:
        """The next message of the first process, or of another one that ended the job; "" where there is none."""
        assert self.job is not None
        for rank, each in enumerate(self.others, 1):
            if each.connection.poll() or not each.alive():
                kind, message = each.said()
                if kind not in ENDED:  # has done its share, or warns of what the first warns of too
                    return "", None
                message = f"rank {rank}: {message}"
                return kind, self._stored(message) if kind == "failed" else message
        return super().said() if self.connection.poll() or not super().alive() else ("", None)

    def _stored(self, message: str) -> str:
        assert self.job is not None
        return store_error(message, self.job, self.execution)

    def news(self) -> Event | None:
        """What has happened to the job; None where nothing has. Where it failed, all processes are ended."""
        job, (kind, message) = self.job, self.said()
        assert job is not None
        if kind == "convened":
            for other in self.others:
                other.start(replace(job, kind=message[0], keys=message[1]))
        if kind in ("failed", "died") and (killed := self._killed()):
            kind, message = "died", killed
        if kind in ENDED:
            for each in (self, *self.others):
                each.kill()
        return None if kind in ("", "convened") else self.event(kind, message)

    def _killed(self) -> str:
        """How one of the processes died, of which another may only have found that it is gone; "" where none did."""
        everyone = (self, *self.others)
        gone = wait([each.process.sentinel for each in everyone], timeout=1.0)
        for rank, each in enumerate(everyone):
            if each.process.sentinel in gone:
                each.process.join()
                return f"rank {rank}: {death(each.process.exitcode)}"
        return ""

    def dismiss(self) -> None:
        """Asks all processes to end; where they are on a job, they store where it is."""
        super().dismiss()
        for other in self.others:
            other.dismiss()

    def join(self) -> None:
        """Waits for the end of all processes, and makes an end of them."""
        super().join()
        for other in self.others:
            other.join()


def lead(connection: Connection, work: Callable[..., None], execution: Execution) -> None:
    """What the first process does: jobs, with a `convene` that calls the others."""

    def led(job: Job, execution: Execution, stopping: Callable[[], bool]) -> None:
        def convene(stages: Sequence[Stage]) -> None:
            if stopping():
                raise Interrupted("stopped before the ranks began together")
            connection.send(("convened", (stages[0].kind, tuple(stage.key for stage in stages))))
            _meet()

        work(job, execution, stopping, convene)

    serve(connection, led, execution)


def follow(connection: Connection, assist: Work, execution: Execution) -> None:
    """What the other processes do: stages, together with the first."""

    def followed(job: Job, execution: Execution, stopping: Callable[[], bool]) -> None:
        logging.getLogger("vlprune").setLevel(logging.WARNING)  # the rest is said by the first
        stopping()  # from now on all stop together
        _meet()
        assist(job, execution, stopping)

    serve(connection, followed, execution)


def _meet() -> None:
    """Joins the process group of the team, on the device of this rank."""
    import torch
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    PartialState(cpu=not cuda, timeout=PATIENCE)
