"""Checked access to annotation files: what is malformed is an error that names the file and the entry."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from vlprune.store.documents import number, read_json

PEEK = 1 << 16  # characters of a list that are read to see its first entry
SHOWN = reprlib.Repr()
SHOWN.maxstring = 200
INT64 = 2**63  # what the columns of a data set hold
SPLIT = re.compile(r"(?:^|[^a-zA-Z])(train|val|test(?:-dev)?)(?![a-zA-Z])")  # in a file name: train2014, not retrieval


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
            return json.JSONDecoder(parse_int=number).raw_decode(start.lstrip()[1:].lstrip())[0]
        except json.JSONDecodeError:
            if len(start) < size:
                return None
            size *= 8
        except RecursionError:  # as `check_whole` says
            return None


def _first_line(start: str) -> Any:
    line, more, _ = start.lstrip().partition("\n")
    try:
        return json.loads(line, parse_int=number) if more else None
    except (ValueError, RecursionError):
        return None


def check_whole(paths: Iterable[Path]) -> None:
    """Refuses files in which nothing was found because they are damaged or empty.

    Raises:
        ValueError: the first of them.
    """
    for path in paths:
        if read_json(path) in ([], {}):
            raise ValueError(f"{path} is empty: it has no entries")


def shown(value: Any) -> str:
    """A value of an annotation as an error shows it: in one printable line that is not long."""
    return SHOWN.repr(value)


def listed(names: Collection[Any]) -> str:
    """The first names of many, as an error shows them."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name).strip("'\"") for name in islice(names, 10)) + more


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
        raise ValueError(f"{where}: lacks {', '.join(missing)}; it has: {listed(item)}")
    for key, kind in wanted.items():
        if not isinstance(item[key], kind) or isinstance(item[key], bool):  # a bool is an int to Python
            kinds = " or ".join(each.__name__ for each in get_args(kind) or (kind,))
            raise ValueError(f"{where}: {key} must be {kinds}, got {reprlib.repr(item[key])}")
        check_writable(where, key, item[key])
    return [item[key] for key in wanted]


def check_writable(where: str, key: str, value: Any) -> None:
    """Refuses what no column of a data set holds: whole numbers beyond 64 bits, and halves of characters.

    Raises:
        ValueError: with the value.
    """
    if isinstance(value, int) and not -INT64 <= value < INT64:
        raise ValueError(f"{where}: {key} must be a whole number of 64 bits, got {shown(value)}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {key} holds half of a character (a lone surrogate): {shown(value)}") from None


def text(where: str, item: Any, key: str) -> str:
    """The text that an item has under a key; an empty one is an error."""
    (found,) = fields(where, item, {key: str})
    if not found.strip():
        raise ValueError(f"{where}: {key} must be a text that is not empty, got {shown(found)}")
    return found


def texts(where: str, item: Any, key: str) -> list[str]:
    """The texts that an item has under a key, one or a list of several; empty ones are errors."""
    (found,) = fields(where, item, {key: str | list})
    if not found:
        raise ValueError(f"{where}: {key} must be a text that is not empty, got {found!r}")
    several = [found] if isinstance(found, str) else found
    for each in several:
        if not (isinstance(each, str) and each.isascii() and each.strip()):
            text(where, {key: each}, key)
    return several


def answer_type(where: str, item: Any) -> str | None:
    """What an item says of its answers, such as "yes/no", "number" or "other" in VQA; None if it says nothing."""
    return text(where, item, "answer_type") if item.get("answer_type") is not None else None


def once(where: str, key: str, value: int | str, seen: dict[str, int | str]) -> None:
    """Adds an id to `seen`; one that is there already, 5 being "5", and one of another type than those are errors."""
    first = next(iter(seen.values()), value)
    if type(value) is not type(first):
        kinds = type(value).__name__, type(first).__name__
        raise ValueError(f"{where}: {key} {shown(value)} is {kinds[0]}, those before are {kinds[1]}")
    if str(value) in seen:
        raise ValueError(f"{where}: {key} {listed([value])} occurs twice")
    seen[str(value)] = value


def split_of(path: Path) -> str | None:
    """The split that a file name has as a word of its own; None if there is none or more than one."""
    words = set(SPLIT.findall(path.name))
    return words.pop() if len(words) == 1 else None


def no_split(where: object, split: str, there: Iterable[str]) -> ValueError:
    """The error that says that a split does not exist, and which do."""
    return ValueError(f"{where} has no split {split!r}; it has: {listed(sorted(there)) or 'none'}")
