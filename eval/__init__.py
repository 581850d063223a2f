"""Tasks and their metrics; they know a model only as the Protocol of `eval.base`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.base import Task

    TASKS: dict[str, Task]

# The registry: each name is a module of this package whose TASK is the task of that name.
NAMES = (
    "retrieval",
    "captioning",
    "vqa",
)


def __getattr__(name: str) -> Any:
    """TASKS, {name: Task}, built when first asked for, so that `python -m eval.vqa` imports no other task."""
    if name != "TASKS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["TASKS"] = {each: import_module(f"{__name__}.{each}").TASK for each in NAMES}
    return globals()["TASKS"]


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: an unknown name.
    """
    from eval import TASKS
    from eval.options import unknown

    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return TASKS[name]
