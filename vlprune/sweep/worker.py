"""What a worker does with a job."""

from __future__ import annotations

from collections.abc import Callable

from vlprune.execution import Execution
from vlprune.pipeline import Chain, chain
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.stage import Bench, obtain
from vlprune.sweep.job import Job


def work(job: Job, execution: Execution, stopping: Callable[[], bool]) -> None:
    """Makes the stages of a job.

    Args:
        job: the stages that are wanted, as a plan has them.
        execution: how and where, with a store.
        stopping: whether the process was asked to stop.

    Raises:
        ValueError: the models, data or code are not those that were planned with; nothing made of them is stored.
        Interrupted: the process was asked to stop; the same job goes on from there later.
    """

    def chains() -> list[Chain]:
        known = Fingerprints(skip_broken=execution.skip_broken)
        return [chain(config, known) for config in job.configs]

    def verify() -> None:
        if missing := set(job.keys) - {stage.key for own in chains() for stage in own.of_kind(job.kind)}:
            raise ValueError(
                f"the models, data or code of {job} have changed since it was planned ({', '.join(sorted(missing))} is "
                "no key of theirs now); nothing was stored, start the sweep again"
            )

    verify()
    bench, found = Bench(execution, stopping=stopping, verify=verify), chains()
    stages = {stage.key: stage for own in found for stage in own.of_kind(job.kind)}
    obtain([stages[key] for key in job.keys], bench)
