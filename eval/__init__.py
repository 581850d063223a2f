"""Tasks and their metrics; knows a model only as the Protocol of `eval.base`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.base import Task

    TASKS: dict[str, Task]


def __getattr__(name: str) -> Any:
    """TASKS, built when first asked for, so that `python -m eval.vqa` imports its module once and no other task."""
    if name != "TASKS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eval import captioning, retrieval, vqa

    globals()["TASKS"] = {task.name: task for task in (retrieval.TASK, captioning.TASK, vqa.TASK)}
    return globals()["TASKS"]


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: an unknown name.
    """
    from eval import TASKS

    if name not in TASKS:
        close = get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown task {name!r}{hint} There are: {', '.join(TASKS)}")
    return TASKS[name]
