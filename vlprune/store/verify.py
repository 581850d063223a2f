"""Whether every file of a results directory is the one that was stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlprune.store.artifacts import SUFFIX, intact, read_note
from vlprune.store.keys import digest
from vlprune.store.record import RECORD, predictions_path, read_record

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Verified:
    """What was found in a results directory.

    Attributes:
        intact: {kind of file: number of files that are those that were stored}.
        faults: what is wrong, a line for each file.
    """

    intact: dict[str, int]
    faults: tuple[str, ...]


def verify(results: Path, elsewhere: Collection[Path] = ()) -> Verified:
    """Compares every artifact with its note, every note with its key, and every record with its predictions.

    Fine-tuned weights that are gone are no fault: they may be deleted on purpose. Nothing is changed.

    Args:
        results: the results directory.
        elsewhere: files, as paths below it, that a remote has and that may be missing here.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"there is no results directory {str(results)!r}")
    good: Counter[str] = Counter()
    faults = []
    for note in sorted(results.rglob(f"*{SUFFIX}")):
        path = note.with_name(note.name.removesuffix(SUFFIX))
        if fault := _fault(path):
            faults.append(f"{path}: {fault}")
        elif path.is_file():
            good[_kind(path, results)] += 1
    faults += list(_faults_of_runs(results, elsewhere))
    return Verified(dict(good), tuple(faults))


def _kind(path: Path, results: Path) -> str:
    parts = path.relative_to(results).parts
    return "checkpoints" if path.suffix == f".{CHECKPOINT}" else parts[1] if parts[0] == "cache" else parts[0]


def _fault(path: Path) -> str:
    """What is wrong with an artifact that has a note."""
    note = read_note(path)
    if note is None:
        return "its note is damaged"
    if note.made_of and digest(note.made_of) != _key(path):
        return f"its note is that of {digest(note.made_of)}"
    if not path.is_file():
        return "" if path.parent.name == "tuned" else "it is gone, and its note is there"
    return "" if intact(path) else "it is not the file that its note describes"


def _key(path: Path) -> str:
    return path.parent.name if path.name == RECORD else path.name.partition(".")[0]


def _faults_of_runs(results: Path, elsewhere: Collection[Path]) -> Iterator[str]:
    for path in sorted((results / "runs").glob(f"*/{RECORD}")):
        if not path.with_name(f"{RECORD}{SUFFIX}").is_file():
            yield f"{path}: its note is missing"
            continue
        record = read_record(path.parent)
        if record is None or (said := predictions_path(results, record)).is_file():
            continue
        if said.relative_to(results) not in elsewhere:
            yield f"{path}: its predictions {said} are gone"
