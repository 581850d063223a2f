"""Prediction and reference files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.base import Example


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, or of one JSON list.

    Raises:
        ValueError: naming the file and the line that is not a JSON object.
    """
    text = _read(path)
    if text.lstrip().startswith("["):
        return _objects(path, _parse(path, text))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: wanted a JSON object, found {type(row).__name__}")
            rows.append(row)
    return rows


def read_references(path: Path, split: str | None) -> list[Example]:
    """Examples without images: image_id and captions, or question_id and answers.

    Args:
        path: a Karpathy file (`images` with `sentences`; image_id is cocoid, else imgid, else filename), COCO captions
            or VQA v2 annotations (`annotations`), or examples as JSON lines or one JSON list.
        split: the split of a Karpathy file; None for the other kinds.

    Raises:
        ValueError: a malformed file, a repeated image_id, a split that is missing, unknown or not asked for.
    """
    text = _read(path)
    try:
        whole: Any = json.loads(text)
    except json.JSONDecodeError:  # not one object, so rows or nothing
        whole = None
    keys = whole.keys() if isinstance(whole, dict) else ()
    if "images" in keys and "annotations" not in keys:
        return _karpathy(path, _objects(path, whole["images"]), split)
    if split is not None:
        raise ValueError(f"{path}: only a Karpathy file has splits; leave out split {split!r}")
    return _annotations(path, _objects(path, whole["annotations"])) if "annotations" in keys else list(read_rows(path))


def _karpathy(path: Path, images: list[dict[str, Any]], split: str | None) -> list[Example]:
    splits = sorted({_field(path, image, "split") for image in images})
    if split not in splits:
        asked = "name a split" if split is None else f"no split {split!r}"
        raise ValueError(f"{path}: {asked}; there are: {', '.join(splits)}")
    ids: dict[str, int | str] = {}
    for image in images:
        image_id = _field(path, image, next((key for key in ("cocoid", "imgid") if key in image), "filename"))
        if str(image_id) in ids:
            raise ValueError(f"{path}: image_id {image_id} occurs twice")
        ids[str(image_id)] = image_id
    return [
        {
            "image_id": image_id,
            "captions": [_field(path, sentence, "raw") for sentence in _field(path, image, "sentences")],
        }
        for image_id, image in zip(ids.values(), images)
        if image["split"] == split
    ]


def _annotations(path: Path, annotations: list[dict[str, Any]]) -> list[Example]:
    if annotations and "caption" in annotations[0]:
        captions: dict[Any, list[str]] = {}
        for row in annotations:
            captions.setdefault(_field(path, row, "image_id"), []).append(_field(path, row, "caption"))
        return [{"image_id": image, "captions": found} for image, found in captions.items()]
    return [
        {
            "question_id": _field(path, row, "question_id"),
            "answers": [_field(path, given, "answer") for given in _field(path, row, "answers")],
        }
        for row in annotations
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None


def _objects(path: Path, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise ValueError(f"{path}: wanted a list of JSON objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, entry {number}: wanted a JSON object, found {type(row).__name__}")
    return rows


def _field(path: Path, row: Any, key: str) -> Any:
    if not isinstance(row, Mapping) or key not in row:
        raise ValueError(f"{path}: an entry has no {key!r}: {json.dumps(row)[:80]}")
    return row[key]
