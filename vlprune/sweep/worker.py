"""What a worker does with a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlprune.execution import Execution
from vlprune.store.artifacts import intact
from vlprune.store.lease import claimed_at_once
from vlprune.sweep.job import Job

if TYPE_CHECKING:
    from vlprune.stages.stage import Stage

# What imports torch is imported inside: a sweep names these functions to its workers, and needs no torch itself.


def alone(_stages: Sequence[Stage]) -> None:
    """Calls nobody: the `convene` of a worker that has no others beside it."""


def work(
    job: Job,
    execution: Execution,
    stopping: Callable[[], bool],
    convene: Callable[[Sequence[Stage]], None] = alone,
) -> None:
    """Makes the stages of a job.

    Args:
        job: the stages that are wanted, as a plan has them.
        execution: how and where, with a store.
        stopping: whether the process was asked to stop.
        convene: has the other ranks make stages together with this one.

    Raises:
        ValueError: the models, data or code are not those that were planned with, or were replaced meanwhile; nothing
            made of them is stored.
        Busy: somebody else is at work on the same.
        Interrupted: the process was asked to stop; the same job goes on from there later.
    """
    from vlprune.stages.stage import Bench, obtain, push

    store = execution.store
    assert store is not None

    stages, before = _look(job, execution)

    def verify() -> None:
        _, now = _look(job, execution)
        if replaced := [name for name in before if now.get(name) != before[name]]:
            raise ValueError(
                f"files of {' and of '.join(replaced)} were replaced or touched while {job} read them; what was made "
                "meanwhile was not stored, start the sweep again"
            )

    bench = Bench(execution, stopping=stopping, verify=verify, convene=convene)
    wanted = [stages[key] for key in job.keys]
    missing = [stage for stage in wanted if not intact(stage.path(store))]
    with claimed_at_once(stage.path(store) for stage in missing):
        obtain(missing, bench)
    for stage in set(wanted) - set(missing):
        push(stage, bench)  # whoever gave the job could not have it
    if execution.remote is not None:
        for path in {tuned.path(store) for stage in wanted for tuned in _tuned(stage)}:
            path.unlink(missing_ok=True)  # the largest artifact, which is at the remote for whoever needs it next


def assist(job: Job, execution: Execution, stopping: Callable[[], bool]) -> None:
    """Makes stages together with the first rank, which stores them.

    Args:
        job: the stages, of one pass, with the configs that they are part of; what they read is stored.
        execution: how and where, with a store.
        stopping: whether the process was asked to stop.

    Raises:
        ValueError: the models, data or code are not those that were planned with.
        Interrupted: a rank was asked to stop.
    """
    from vlprune.stages.stage import Bench, obtain

    found, _ = _look(job, execution)
    stages, bench = [found[key] for key in job.keys], Bench(execution, stopping=stopping)
    stages[0].make(stages, obtain(stages[0].inputs, bench), bench)


def _tuned(stage: Stage) -> Iterator[Stage]:
    """The stage of fine-tuned weights among a stage and those that it is made from; none before fine-tuning."""
    if stage.kind == "tuned":
        yield stage
    elif stage.kind in ("predictions", "record"):
        yield from _tuned(stage.inputs[0])


def _look(job: Job, execution: Execution) -> tuple[dict[str, Stage], dict[str, str]]:
    """The stages that the configs stand for at present, by key, and what the files they read look like."""
    from vlprune.pipeline import chain
    from vlprune.stages.fingerprints import Fingerprints

    known = Fingerprints(skip_broken=execution.skip_broken)
    chains = [chain(config, known) for config in job.configs]
    stages = {stage.key: stage for own in chains for stage in own.of_kind(job.kind)}
    if missing := set(job.keys) - stages.keys():
        raise ValueError(
            f"the models, data or code of {job} have changed since it was planned ({', '.join(sorted(missing))} is "
            "no key of theirs now); nothing was stored, start the sweep again"
        )
    return stages, known.listings
