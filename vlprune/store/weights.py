"""Which fine-tuned weights stay on disk once the predictions made with them are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlprune.execution import KeepWeights
from vlprune.store.artifacts import Note, note_path, read_note, write_note
from vlprune.store.record import Record
from vlprune.store.remote import NOWHERE, Remote

TEMPORARY = "temporary"  # the fact in a note that says that weights were stored for a while only


def weights_path(results: Path, record: Record) -> Path:
    """Where the fine-tuned weights of a run are, or were."""
    return tuned_path(results, record.stages["tuned"])


def tuned_path(results: Path, key: str) -> Path:
    """Where fine-tuned weights of this key are."""
    return results / "cache" / "tuned" / f"{key}.safetensors"


def settle(path: Path, keep: KeepWeights | None, remote: Remote = NOWHERE) -> None:
    """Deletes fine-tuned weights that were stored only until the predictions made with them are.

    Weights that are to be kept are marked instead, as those that an earlier sweep stored for a while may be.

    Args:
        path: the file of the weights.
        keep: which weights stay, as `Execution.keep_weights` says it.
        remote: where they are deleted or marked as well.
    """
    note = read_note(path) if path.exists() else None
    if note is not None and note.facts.get(TEMPORARY):
        if keep in (None, "none"):
            path.unlink(missing_ok=True)
        else:
            _mark(path, note)
    note = remote.note(path)
    if note is not None and note.facts.get(TEMPORARY):
        if keep in (None, "none"):
            remote.remove(path)
        else:
            _mark(path, note)
            remote.push_file(note_path(path))


def _mark(path: Path, note: Note) -> None:
    """Says in the note of weights that they are to be kept."""
    write_note(path, replace(note, facts={**note.facts, TEMPORARY: False}), note.sha256)
