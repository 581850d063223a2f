"""JSON files that others wrote: read whole, or refused in one line that says where they are damaged."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

DEEPEST = 200  # lists and objects inside each other; no annotation, config or tokenizer has more than a few
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def read_json(path: Path) -> Any:
    """The document of a file; a whole number that Python refuses for its length is an infinite float.

    Raises:
        ValueError: it is empty, no JSON or nested deeper than Python reads.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """The document of a text; arguments and errors as of `read_json`, `where` being the place of the text."""
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of thousands of digits, which may stand where nothing reads it
            return json.loads(text, parse_int=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply: {too_deep(text) or 'in many places'}") from None


def number(digits: str) -> int | float:
    """The whole number of some digits; an infinite float where Python refuses them for being thousands."""
    with suppress(ValueError):
        return int(digits)
    return float(digits)


def too_deep(text: str) -> str | None:
    """The place in a text, as line and column, where DEEPEST lists and objects are open; None if there is none."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth == DEEPEST:
            line = text.count("\n", 0, found.start()) + 1
            return f"line {line} column {found.start() - text.rfind(chr(10), 0, found.start())}"
    return None
