"""The examples that a task is trained and evaluated on, and what is known to be wrong with some."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from datasets import Dataset

from eval import TASKS, get_task
from eval.options import unknown
from vlprune.config import TaskConfig, build
from vlprune.data import (
    annotation_files,
    guards,
    load_answers,
    load_pairs,
    load_questions,
    take_data_fingerprint,
)
from vlprune.models import ModelAdapter

EXAMPLES = {"questions": load_questions, "pairs": load_pairs}


def examples(task: TaskConfig, split: str, *, skip_broken: bool = False) -> Dataset:
    """The examples of a split, or of several as in "train+val", that a task is trained or evaluated on."""
    return EXAMPLES[get_task(task.name).examples](task.data, split, task.limit, skip_broken=skip_broken)


def check_metrics(task: TaskConfig, split: str, *, skip_broken: bool = False) -> None:
    """Refuses a split on which the metrics of the task cannot be computed, or options with which they cannot.

    Raises:
        ValueError: with the reason.
        RuntimeError: a further metric needs what is not there.
    """
    chosen = get_task(task.name)
    for metric in extra_metrics(task):
        chosen.extra[metric]()
    options: Any = build(chosen.options, task.options, "task.options")
    chosen.check(options, examples(task, split, skip_broken=skip_broken))


def extra_metrics(task: TaskConfig) -> list[str]:
    """The metrics that are computed on request.

    Raises:
        ValueError: one that the task does not have.
    """
    known, wanted = get_task(task.name).extra, [name for name in task.extra.split("+") if name]
    for name in wanted:
        if name not in known:
            raise ValueError(unknown(f"extra metric of {task.name}", name, known))
    return wanted


def prepared(task: TaskConfig, *, skip_broken: bool = False) -> Any:
    """What a task prepares from its training examples to predict; of questions the answer list that data comes with."""
    chosen = get_task(task.name)
    if chosen.prepare is None:
        return None
    listed = load_answers(task.data) if chosen.examples == "questions" else None
    if listed is not None:
        return listed
    return _prepared(chosen.prepare, task, skip_broken, take_data_fingerprint(task.data)[:2])


def floors(task: TaskConfig, *, skip_broken: bool = False) -> dict[str, dict[str, float]]:
    """{name of a floor: {metric: value}} of a task on its data, reached without learning."""
    return _floors(get_task(task.name).floors, task, skip_broken, take_data_fingerprint(task.data)[:2])


# Once in a process for the same data: a worker makes many runs on it.
@lru_cache(maxsize=8)
def _prepared(prepare: Callable[[Any], Any], task: TaskConfig, skip_broken: bool, _known: tuple[str, str]) -> Any:
    return prepare(columns(examples(task, task.train, skip_broken=skip_broken)))


@lru_cache(maxsize=8)
def _floors(
    compute: Callable[[Any, Any, Any], dict[str, dict[str, float]]],
    task: TaskConfig,
    skip_broken: bool,
    _known: tuple[str, str],
) -> dict[str, dict[str, float]]:
    options: Any = build(get_task(task.name).options, task.options, "task.options")
    train, test = (columns(examples(task, split, skip_broken=skip_broken)) for split in (task.train, task.test))
    return compute(train, test, options)


def columns(data: Dataset) -> list[dict[str, Any]]:
    """The examples without their pictures."""
    return data.remove_columns("image").to_list()


def check_can(model: ModelAdapter, task: TaskConfig, name: str) -> None:
    """Refuses a task that a model cannot do.

    Args:
        model: the model.
        task: the task.
        name: what to call the model.

    Raises:
        ValueError: with the tasks that it can do.
    """
    if not model.can(get_task(task.name).needs):
        able = ", ".join(other.name for other in TASKS.values() if model.can(other.needs))
        raise ValueError(f"{name} cannot do {task.name}; it can do: {able}")


def seen_in_training(model: ModelAdapter, task: TaskConfig, name: str) -> str | None:
    """A warning if a model was trained on the questions that a task asks it, else None.

    Args:
        model: the model.
        task: the task.
        name: name of the model, which can tell what it was trained for.
    """
    chosen = get_task(task.name)
    if chosen.references != "answers":
        return None
    trained_for = str(model.config.get("trained_for", ""))
    return guards.seen_in_training(name, trained_for, annotation_files(task.data, chosen.examples), task.test)


def missed_answers(task: TaskConfig, train: Dataset) -> str | None:
    """A warning if the answers that data comes with miss most of those of its training examples, else None."""
    if get_task(task.name).references != "answers" or (listed := load_answers(task.data)) is None:
        return None
    return guards.missed_answers(listed, train.select_columns("answers").to_list())


def few_answers(task: TaskConfig, test: Dataset) -> str | None:
    """A warning if questions have several answers, but too few for the accuracy of VQA, else None."""
    if get_task(task.name).references != "answers":
        return None
    return guards.few_answers(test.select_columns("answers").to_list())
