"""Artifacts: files that are made once and then read, also by several processes, each with a note beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlprune.store.atomic import atomic, write_text

SUFFIX = ".note"
OWN = "note_sha256"  # the digest of the rest of a note


@dataclass(frozen=True)
class Note:
    """What is known of an artifact beside its content; stored as JSON next to it.

    Attributes:
        sha256: SHA-256 of the file; empty for an artifact that was never written.
        costs: {kind of stage: [seconds, peak memory in bytes]} of making it and all that it was made from.
        facts: what its maker measured, such as the sparsity after fine-tuning.
        made_of: what its key is the digest of.
        origins: {kind of stage: when, where and with what it was made, as `origin` returns it}, of the artifact and of
            all that it was made from.
    """

    sha256: str = ""
    costs: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    made_of: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)


def note_path(path: Path) -> Path:
    """Where the note of an artifact is."""
    return path.with_name(f"{path.name}{SUFFIX}")


def read_note(path: Path) -> Note | None:
    """The note of an artifact, which may be there without its file; None where there is none, or a damaged one."""
    try:
        return parse_note(note_path(path).read_bytes())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise _unreadable(error) from error


def parse_note(text: bytes) -> Note | None:
    """The note that the content of a file says; None where it is damaged."""
    try:
        values = json.loads(text.decode())
        told = values.pop(OWN)
        return Note(**values) if told == _digest(values) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def intact(path: Path) -> bool:
    """Whether the file of an artifact is there and is the one that its note describes."""
    note = read_note(path)
    try:
        return note is not None and describes(note, path)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        raise _unreadable(error) from error


def content(path: Path) -> bytes:
    """The content of an artifact's file, for files that are small.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the one that its note describes, or its note is missing or damaged.
    """
    try:
        found = path.read_bytes()
    except PermissionError as error:
        raise _unreadable(error) from error
    if (note := read_note(path)) is None:
        raise ValueError("its note is damaged" if note_path(path).is_file() else "its note is missing")
    if note.sha256 != hashlib.sha256(found).hexdigest():
        raise ValueError("it is not the file that its note describes")
    return found


def describes(note: Note, path: Path) -> bool:
    """Whether a file is the one of a note.

    Raises:
        FileNotFoundError: there is no file.
    """
    return note.sha256 == _sha256(path)


@contextmanager
def written(path: Path, note: Note) -> Iterator[Path]:
    """A path to write an artifact to, which is stored with its note at the end of the block, in full or not at all.

    Raises:
        OSError: the file cannot be written, for example on a full disk.
    """
    with atomic(path) as half:
        yield half
        # The note comes first: a crash in between leaves a pair that does not match, which counts as not made.
        write_note(path, note, _sha256(half))


def write_note(path: Path, note: Note, sha256: str = "") -> None:
    """Stores the note of an artifact."""
    values = {**asdict(note), "sha256": sha256}
    text = json.dumps({**values, OWN: _digest(values)}, indent=1, allow_nan=False)
    write_text(note_path(path), text + "\n")


def _digest(values: Mapping[str, Any]) -> str:
    """The SHA-256 of what a note says."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(error: PermissionError) -> PermissionError:
    return PermissionError(
        f"{error.filename} may not be read by this user; make it readable, or use another results directory"
    )
