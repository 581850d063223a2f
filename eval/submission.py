"""The files that EvalAI takes: answers of VQA v2, captions of COCO and NoCaps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.files import field, image_ids, objects, read_document, read_rows


def write_submission(path: Path, rows: Sequence[Mapping[str, Any]], *, key: str, said: str, wanted: Path | None) -> int:
    """Writes [{key: int, said: str}], what EvalAI takes, in full or not at all; returns the number of predictions.

    Args:
        path: path of the file to write.
        rows: the predictions, with other fields or without.
        key: name of the field of ids, "question_id" or "image_id".
        said: name of the field of texts, "answer" or "caption".
        wanted: file that lists every id (VQA v2 questions, COCO images, or objects with the key), with which the ids
            must agree; None: not checked.

    Raises:
        ValueError: an id that is no whole number, repeated, missing or not wanted; an answer that is no text.
    """
    given: dict[int, str] = {}
    for number, row in enumerate(rows, 1):
        if lacking := [name for name in (key, said) if name not in row]:
            raise ValueError(f"number {number} of the predictions has no {lacking[0]!r}; it has: {', '.join(row)}")
        value, text = row[key], row[said]
        if isinstance(value, bool) or not str(value).isdecimal():
            raise ValueError(f"number {number} of the predictions: {key} must be a whole number, got {value!r}")
        if not isinstance(text, str):
            raise ValueError(f"number {number} of the predictions: {said} must be a text, got {text!r}")
        if int(value) in given:
            raise ValueError(f"{key} {value} occurs twice in the predictions")
        given[int(value)] = text
    if wanted is not None:
        ids = _ids(wanted, key)
        missing, unknown = [i for i in ids if i not in given], [i for i in given if i not in ids]
        if missing or unknown:
            shown = ", ".join(map(str, (missing or unknown)[:3]))
            fault = f"{len(missing)} have no prediction" if missing else f"{len(unknown)} are not among them"
            raise ValueError(f"{len(given)} predictions for the {len(ids)} of {wanted}: {fault} ({key} {shown})")
    if not given:
        raise ValueError("there are no predictions")
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with half.open("w", encoding="utf-8") as file:
            json.dump([{key: value, said: text} for value, text in given.items()], file)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return len(given)


def _ids(path: Path, key: str) -> dict[int, None]:
    """The ids that a file lists."""
    whole = read_document(path)
    name = next((n for n in ("questions", "images", "annotations") if isinstance(whole, dict) and n in whole), None)
    rows = read_rows(path) if name is None else objects(path, whole[name])
    if key == "image_id" and name == "images":
        rows = [{key: field(path, row, "id")} for row in rows]
    elif key == "image_id" and rows and "image" in rows[0]:
        rows = [{key: i} for i in image_ids(rows)]
    ids = [field(path, row, key) for row in rows]
    if faulty := [i for i in ids if isinstance(i, bool) or not str(i).isdecimal()]:
        raise ValueError(f"{path}: {key} must be a whole number, got {faulty[0]!r}")
    return dict.fromkeys(map(int, ids))
