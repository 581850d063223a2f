"""Prediction and reference files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
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
        return objects(path, _document(path, text))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = _parse(line, f"{path}, line {number}")
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: wanted a JSON object, found {type(row).__name__}")
            rows.append(row)
    return rows


def read_references(path: Path, split: str | None) -> list[Example]:
    """Examples without images: image_id and captions, or question_id and answers.

    Args:
        path: a Karpathy file (`images` with `sentences`; image_id is cocoid, else imgid, else filename; restval is
            train), COCO captions or VQA v2 annotations (`annotations`), a list of ALBEF, BLIP or X-VLM (rows of {image,
            caption}, see `image_ids`, or {question_id, answer}), or examples as JSON lines or one JSON list.
        split: the split of a Karpathy file; None for the other kinds.

    Raises:
        ValueError: a malformed file, a repeated image_id, a split that is missing, unknown or not asked for.
    """
    whole = read_document(path)
    keys = whole.keys() if isinstance(whole, dict) else ()
    if "images" in keys and "annotations" not in keys:
        return _karpathy(path, objects(path, whole["images"]), split)
    if split is not None:
        raise ValueError(f"{path}: only a Karpathy file has splits; leave out split {split!r}")
    if "annotations" in keys:
        return _annotations(path, objects(path, whole["annotations"]))
    rows = read_rows(path)
    if rows and "image" in rows[0] and "caption" in rows[0] and "captions" not in rows[0]:
        return _captions(path, rows)
    if rows and "answer" in rows[0] and "answers" not in rows[0]:
        return [
            {"question_id": field(path, row, "question_id"), "answers": _listed(field(path, row, "answer"))}
            for row in rows
        ]
    return list(rows)


def image_ids(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The ids of images that a list names by their files, one a row; rows of the same `image` are one image.

    The ids are image_id or img_id if all are whole numbers, as those of NoCaps; else the numbers that all file names
    end with, if every image has its own, as those of COCO do; else the paths.
    """
    names = [row["image"] for row in rows]
    for key in ("image_id", "img_id"):
        given = [row.get(key) for row in rows]
        if _name_images(given, names):
            return given
    ends = [re.search(r"(?:^|[^0-9A-Za-z])(\d+)$", os.path.splitext(os.path.basename(name))[0]) for name in names]
    numbers = [int(end[1]) if end else None for end in ends]
    return numbers if _name_images(numbers, names) else names


def _name_images(ids: Sequence[Any], names: Sequence[str]) -> bool:
    """Whether whole numbers tell images apart just as their names do."""
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    return whole and len(set(ids)) == len(set(names)) == len(set(zip(ids, names)))


def read_document(path: Path) -> Any:
    """The document of a JSON file; None for JSON lines and what is not JSON.

    Raises:
        ValueError: it is nested deeper, or has a longer whole number, than Python reads.
    """
    try:
        return _parse(_read(path), str(path))
    except json.JSONDecodeError:
        return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _captions(path: Path, rows: list[dict[str, Any]]) -> list[Example]:
    """The captions of each image of a list that names it by its file."""
    captions: dict[Any, list[str]] = {}
    for row in rows:
        if not isinstance(field(path, row, "image"), str):
            raise ValueError(f"{path}: image must be a path, got {row['image']!r}")
    for image_id, row in zip(image_ids(rows), rows):
        captions.setdefault(image_id, []).extend(_listed(field(path, row, "caption")))
    return [{"image_id": image_id, "captions": found} for image_id, found in captions.items()]


def _karpathy(path: Path, images: list[dict[str, Any]], split: str | None) -> list[Example]:
    own = ["train" if (name := field(path, image, "split")) == "restval" else name for image in images]
    splits = sorted(set(own))
    if split not in splits:
        asked = "name a split" if split is None else f"no split {split!r}"
        raise ValueError(f"{path}: {asked}; there are: {', '.join(splits)}")
    ids: dict[str, int | str] = {}
    for image in images:
        image_id = field(path, image, next((key for key in ("cocoid", "imgid") if key in image), "filename"))
        if str(image_id) in ids:
            raise ValueError(f"{path}: image_id {image_id} occurs twice")
        ids[str(image_id)] = image_id
    return [
        {
            "image_id": image_id,
            "captions": [field(path, sentence, "raw") for sentence in field(path, image, "sentences")],
        }
        for image_id, image, own_split in zip(ids.values(), images, own)
        if own_split == split
    ]


def _annotations(path: Path, annotations: list[dict[str, Any]]) -> list[Example]:
    if annotations and "caption" in annotations[0]:
        captions: dict[Any, list[str]] = {}
        for row in annotations:
            captions.setdefault(field(path, row, "image_id"), []).append(field(path, row, "caption"))
        return [{"image_id": image, "captions": found} for image, found in captions.items()]
    return [
        {
            "question_id": field(path, row, "question_id"),
            "answers": [field(path, given, "answer") for given in field(path, row, "answers")],
            "answer_type": row.get("answer_type"),
        }
        for row in annotations
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def _document(path: Path, text: str) -> Any:
    try:
        return _parse(text, str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None


def _parse(text: str, where: str) -> Any:
    """What `json.loads` returns, and its JSONDecodeError; what it has no words for is a ValueError with the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(f"{where}: lists and objects are nested too deeply") from None
    except ValueError:
        raise ValueError(f"{where}: a whole number has more digits than can be read") from None


def objects(path: Path, rows: Any) -> list[dict[str, Any]]:
    """The rows, if they are a list of objects; else a ValueError that names the file."""
    if not isinstance(rows, list):
        raise ValueError(f"{path}: wanted a list of JSON objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, entry {number}: wanted a JSON object, found {type(row).__name__}")
    return rows


def field(path: Path, row: Any, key: str) -> Any:
    """The value of a key, which the row of a file must have."""
    if not isinstance(row, Mapping) or key not in row:
        raise ValueError(f"{path}: an entry has no {key!r}: {json.dumps(row)[:80]}")
    return row[key]
