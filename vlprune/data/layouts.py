"""Readers of annotation files: Karpathy splits, VQA v2 questions and answers, region boxes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

SPLITS = ("train", "val", "test")


def load_pairs(root: Path, split: str) -> Dataset:
    """Images with captions of a directory in the Karpathy layout (`dataset_*.json`, `images/`).

    Columns: image (PIL, read on access), image_id, captions (list of str), regions (list of {box, phrase}; boxes are
    [x, y, width, height] in pixels, from `regions.json` where there is one).

    Raises:
        FileNotFoundError: no annotation file, or an image that it names is missing.
        ValueError: a malformed annotation, a split without images.
    """
    files = sorted(root.glob("dataset_*.json"))
    if len(files) != 1:
        raise FileNotFoundError(f"wanted one dataset_*.json (Karpathy layout) in {root}, found {len(files)}")
    rows, splits = [], set()
    for where, item in _items(files[0], "images"):
        name, own_split, sentences = _fields(where, item, "filename", "split", "sentences")
        own_split = "train" if own_split == "restval" else own_split
        splits.add(own_split)
        if own_split != split:
            continue
        captions = [_fields(f"{where}, sentence {i}", s, "raw")[0] for i, s in enumerate(sentences)]
        if not captions:
            raise ValueError(f"{where}: an image without captions")
        path = _image(root / "images", Path(item.get("filepath", "")) / name, where)
        rows.append({"image": str(path), "image_id": item.get("imgid", name), "captions": captions})
    if not rows:
        raise ValueError(f"{files[0]} has no images of split {split!r}; it has: {', '.join(sorted(splits))}")
    boxes = _regions(root)
    for row in rows:
        row["regions"] = boxes.get(Path(row["image"]).name, [])
    return Dataset.from_list(rows).with_transform(_open_images)


def load_questions(root: Path, split: str) -> Dataset:
    """Questions with answers of a directory in the VQA v2 layout (`*questions.json`, `*annotations.json`, `images/`).

    The files are those whose names contain the split, or the only ones, whose questions then carry a `split`. An
    image belongs to the image_id that its file name ends with.

    Columns: image (PIL, read on access), image_id, question, question_id, answers (list of str).

    Raises:
        FileNotFoundError: no annotation files, or an image is missing.
        ValueError: a malformed annotation, a question without annotation, a split without questions.
    """
    asked = _split_file(root, "questions", split)
    answered = _split_file(root, "annotations", split)
    answers = {}
    for where, item in _items(answered, "annotations"):
        question_id, given = _fields(where, item, "question_id", "answers")
        answers[question_id] = [str(_fields(f"{where}, answer {i}", a, "answer")[0]) for i, a in enumerate(given)]
    images = {}
    for path in sorted((root / "images").rglob("*")):
        if number := re.search(r"(\d+)$", path.stem):
            images.setdefault(int(number[1]), path)
    rows = []
    for where, item in _items(asked, "questions"):
        question, question_id, image_id = _fields(where, item, "question", "question_id", "image_id")
        if item.get("split", split) != split:
            continue
        if question_id not in answers:
            raise ValueError(f"{where}: question {question_id} has no answers in {answered}")
        if image_id not in images:
            raise FileNotFoundError(f"{where}: no image in {root / 'images'} has a name that ends with {image_id}")
        rows.append(
            {
                "image": str(images[image_id]),
                "image_id": image_id,
                "question": question,
                "question_id": question_id,
                "answers": answers[question_id],
            }
        )
    if not rows:
        raise ValueError(f"{asked} has no questions of split {split!r}")
    return Dataset.from_list(rows).with_transform(_open_images)


def open_image(path: str) -> Image.Image:
    """The RGB image of a file.

    Raises:
        ValueError: a file that is no image or is cut short, with its name.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error}") from None


def _open_images(rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    """The batch transform of the data sets: paths to pictures."""
    if "image" not in rows:
        return rows
    return {**rows, "image": [open_image(path) for path in rows["image"]]}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _items(path: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("file, key i", item) of the list under key."""
    document = _read(path)
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        raise ValueError(f"{path}: wanted an object with a list {key!r}")
    for i, item in enumerate(document[key]):
        yield f"{path}, {key} {i}", item


def _fields(where: str, item: Any, *keys: str) -> list[Any]:
    """The values of keys, all of them wanted."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: wanted an object with {', '.join(keys)}, got {type(item).__name__}")
    if missing := [key for key in keys if key not in item]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}; it has: {', '.join(item)}")
    return [item[key] for key in keys]


def _image(folder: Path, name: Path, where: str) -> Path:
    """The path of an image below its folder, directly in it if its own folder is left out on disk."""
    folder = folder.resolve()
    for path in ((folder / name).resolve(), (folder / name.name).resolve()):
        if not path.is_relative_to(folder):
            raise ValueError(f"{where}: image path {str(name)!r} leaves {folder}")
        if path.is_file():
            return path
    raise FileNotFoundError(f"{where}: there is no image {folder / name}")


def _regions(root: Path) -> dict[str, list[dict[str, Any]]]:
    """{file name: regions} of `regions.json`, a list of {image, elems: [{bb, caption}]}; empty without the file."""
    path = root / "regions.json"
    if not path.is_file():
        return {}
    found = {}
    for i, item in enumerate(_read(path)):
        where = f"{path}, item {i}"
        name, elements = _fields(where, item, "image", "elems")
        fields = [_fields(f"{where}, element {j}", element, "bb", "caption") for j, element in enumerate(elements)]
        found[Path(name).name] = [{"box": box, "phrase": phrase} for box, phrase in fields]
    return found


def _split_file(root: Path, kind: str, split: str) -> Path:
    files = sorted(root.glob(f"*{kind}.json"))
    named = [path for path in files if split in path.name]
    plain = [path for path in files if not any(s in path.name for s in SPLITS)]
    chosen = named or plain
    if len(chosen) != 1:
        listed = ", ".join(path.name for path in files) or "none"
        raise FileNotFoundError(f"wanted one *{split}*{kind}.json (VQA v2 layout) in {root}, there are: {listed}")
    return chosen[0]
