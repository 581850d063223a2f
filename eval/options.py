"""What options of tasks are made of, and how an unknown name is refused."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(strict=True, extra="forbid")  # options are of their own types, and no others
AtLeastOne = Annotated[int, Field(ge=1, lt=2**31)]  # what counts, and what arrays are as long as


@dataclass(frozen=True, config=STRICT)
class NoOptions:
    """The options of a task, method or model family that has none."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest one that is."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{guess} There are: {', '.join(names) or 'none'}"
