"""Checked access to annotation files: what is malformed is an error that names the file and the entry."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

PEEK = 1 << 16  # characters of a list that are read to see its first entry
SPLIT = re.compile(r"(?:^|[^a-zA-Z])(train|val|test(?:-dev)?)(?![a-zA-Z])")  # in a file name: train2014, not retrieval


def read_json(path: Path) -> Any:
    """The document of a file.

    Raises:
        ValueError: not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def items(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """("file, key i", item) of the list under key."""
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        raise ValueError(f"{path}: wanted an object with a list {key!r}")
    for i, item in enumerate(document[key]):
        yield f"{path}, {key} {i}", item


def list_items(path: Path) -> Iterator[tuple[str, Any]]:
    """("file, item i", item) of a file that is one list."""
    document = read_json(path)
    if not isinstance(document, list):
        raise ValueError(f"{path}: wanted a list, got {type(document).__name__}")
    for i, item in enumerate(document):
        yield f"{path}, item {i}", item


def first_entry(path: Path) -> Any:
    """The first entry of a file that is one list or has an object in each line, which is not read whole; else None."""
    size = PEEK
    while True:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            start = file.read(size)
        if not start.lstrip().startswith("["):
            return _first_line(start)
        try:
            return json.JSONDecoder().raw_decode(start.lstrip()[1:].lstrip())[0]
        except json.JSONDecodeError:
            if len(start) < size:
                return None
            size *= 8


def _first_line(start: str) -> Any:
    line, more, _ = start.lstrip().partition("\n")
    try:
        return json.loads(line) if more else None
    except json.JSONDecodeError:
        return None


def fields(where: str, item: Any, wanted: Mapping[str, Any]) -> list[Any]:
    """The values that an item has under some keys.

    Args:
        where: place of the item, such as "lists/a_train.json, item 3", for errors.
        item: entry of an annotation file.
        wanted: {key: the type of its value, or a union of types}.

    Raises:
        ValueError: an item that is no object, that lacks a key or has a value of another type.
    """
    if not isinstance(item, dict):
        raise ValueError(f"{where}: wanted an object with {', '.join(wanted)}, got {type(item).__name__}")
    if missing := [key for key in wanted if key not in item]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}; it has: {', '.join(item)}")
    for key, kind in wanted.items():
        if not isinstance(item[key], kind) or isinstance(item[key], bool):  # a bool is an int to Python
            kinds = " or ".join(each.__name__ for each in get_args(kind) or (kind,))
            raise ValueError(f"{where}: {key} must be {kinds}, got {reprlib.repr(item[key])}")
    return [item[key] for key in wanted]


def text(where: str, item: Any, key: str) -> str:
    """The text that an item has under a key; an empty one is an error."""
    (found,) = fields(where, item, {key: str})
    if not found.strip():
        raise ValueError(f"{where}: {key} must be a text that is not empty, got {found!r}")
    return found


def texts(where: str, item: Any, key: str) -> list[str]:
    """The texts that an item has under a key, one or a list of several; empty ones are errors."""
    (found,) = fields(where, item, {key: str | list})
    if not found:
        raise ValueError(f"{where}: {key} must be a text that is not empty, got {found!r}")
    listed = [found] if isinstance(found, str) else found
    if not all(isinstance(each, str) and each.strip() for each in listed):
        for each in listed:
            text(where, {key: each}, key)
    return listed


def once(where: str, key: str, value: int | str, seen: dict[str, int | str]) -> None:
    """Adds an id to `seen`; one that is there already, 5 being "5", and one of another type than those are errors."""
    first = next(iter(seen.values()), value)
    if type(value) is not type(first):
        kinds = type(value).__name__, type(first).__name__
        raise ValueError(f"{where}: {key} {value!r} is {kinds[0]}, those before are {kinds[1]}")
    if str(value) in seen:
        raise ValueError(f"{where}: {key} {value} occurs twice")
    seen[str(value)] = value


def split_of(path: Path) -> str | None:
    """The split that a file name has as a word of its own; None if there is none or more than one."""
    words = set(SPLIT.findall(path.name))
    return words.pop() if len(words) == 1 else None


def no_split(where: object, split: str, there: Iterable[str]) -> ValueError:
    """The error that says that a split does not exist, and which do."""
    return ValueError(f"{where} has no split {split!r}; it has: {', '.join(sorted(there)) or 'none'}")
