"""What this process does, in words, and how long it will go on."""

from __future__ import annotations

import time
from typing import NamedTuple


class _Said(NamedTuple):
    """What was said last.

    Attributes:
        doing: what the process does.
        first: (number of steps that were done, when) as it was first said; None: it goes in no steps.
        end: when the last step will be done, at the pace since then; None: nobody knows.
    """

    doing: str = ""
    first: tuple[int, float] | None = None
    end: float | None = None


_said = _Said()


def say(doing: str) -> None:
    """Has the leases of this process tell others what it does; they hear of it within a few seconds."""
    global _said
    _said = _Said(doing)


def say_step(doing: str, done: int, total: int) -> None:
    """Says what this process does step by step, so that others hear how long it will take, too.

    The pace is that of the steps since something else was said last: what was done before, by a process that this one
    goes on from, does not count.

    Args:
        doing: what it does.
        done: number of steps that are done.
        total: number of all steps.
    """
    global _said
    now = time.monotonic()
    begun, began = first = _said.first or (done, now)
    end = now + (now - began) / (done - begun) * (total - done) if done > begun else None
    _said = _Said(doing, first, end)


def doing() -> str:
    """What was said last, with the time that is left: "fine-tuning, step 120 of 400, loss 2.310, 0:42 left"."""
    said = _said
    return said.doing if said.end is None else f"{said.doing}, {clock(max(0.0, said.end - time.monotonic()))} left"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
