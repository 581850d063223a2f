"""Readers of annotation files: Karpathy splits, VQA v2 questions and answers, region boxes."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset
from PIL import Image

SPLIT = re.compile(r"(?:^|[^a-zA-Z])(train|val|test)(?![a-zA-Z])")  # in a file name: train2014, not retrieval
IMAGES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


def load_pairs(root: Path, split: str) -> Dataset:
    """Images with captions of a directory in the Karpathy layout (`dataset_*.json`, `images/`).

    Columns: image (PIL, read on access), image_id (cocoid, else imgid, else filename), captions (list of str), regions
    (list of {box, phrase}; boxes are [x, y, width, height] in pixels, from `regions.json` where there is one).

    Raises:
        FileNotFoundError: no annotation file, or an image that it names is missing.
        ValueError: a malformed annotation, a repeated image_id, a split without images.
    """
    files = sorted(root.glob("dataset_*.json"))
    if len(files) != 1:
        raise FileNotFoundError(f"wanted one dataset_*.json (Karpathy layout) in {root}, found {len(files)}")
    rows, splits, seen = [], set(), {}
    for where, item in _items(files[0], "images"):
        name, own_split, sentences = _fields(where, item, {"filename": str, "split": str, "sentences": list})
        (image_id,) = _fields(where, item, {next((k for k in ("cocoid", "imgid") if k in item), "filename"): int | str})
        _once(where, "image_id", image_id, seen)
        own_split = "train" if own_split == "restval" else own_split
        splits.add(own_split)
        if own_split != split:
            continue
        captions = [_text(f"{where}, sentence {i}", s, "raw") for i, s in enumerate(sentences)]
        if not captions:
            raise ValueError(f"{where}: an image without captions")
        (folder,) = _fields(where, {"filepath": "", **item}, {"filepath": str})
        path = _image(root / "images", Path(folder) / name, where)
        rows.append({"image": str(path), "image_id": image_id, "captions": captions})
    if not rows:
        raise ValueError(f"{files[0]} has no images of split {split!r}; it has: {', '.join(sorted(splits))}")
    boxes = _regions(root)
    for row in rows:
        row["regions"] = boxes.get(Path(row["image"]).name, [])
    return Dataset.from_list(rows).with_transform(_open_images)


def load_questions(root: Path, split: str) -> Dataset:
    """Questions with answers of a directory in the VQA v2 layout (`*questions.json`, `*annotations.json`, `images/`).

    The files are those whose names have the split as a word of its own (`v2_mscoco_train2014_annotations.json`), or the
    only one, whose name has none; then every question carries a `split`. An image belongs to the image_id, a whole
    number, that its file name ends with.

    Columns: image (PIL, read on access), image_id (int), question, question_id, answers (list of str).

    Raises:
        FileNotFoundError: no annotation files, or an image is missing.
        ValueError: files with and without a split in their names or several of one split, a malformed annotation, a
            repeated question_id, a question without annotation, two images of one image_id, a split without questions.
    """
    asked = _split_file(root, "questions", split)
    answered = _split_file(root, "annotations", split)
    answers = _answers(answered)
    images: dict[int, list[Path]] = {}
    for path in sorted((root / "images").rglob("*")):
        number = re.search(r"(\d+)$", path.stem)
        if number and path.suffix.lower() in IMAGES and path.is_file():
            images.setdefault(int(number[1]), []).append(path)
    rows, seen = [], {}
    for where, item in _items(asked, "questions"):
        question = _text(where, item, "question")
        question_id, image_id = _fields(where, item, {"question_id": int | str, "image_id": int | str})
        _once(where, "question_id", question_id, seen)
        if not str(image_id).isdecimal():
            raise ValueError(f"{where}: image_id must be a whole number, got {image_id!r}")
        image_id = int(image_id)
        if "split" not in item and _split_of(asked) is None:
            raise ValueError(f"{where}: lacks split, which every question needs as the file name has none")
        if _fields(where, {"split": split, **item}, {"split": str}) != [split]:
            continue
        if str(question_id) not in answers:
            raise ValueError(f"{where}: question {question_id} has no answers in {answered}")
        found = images.get(image_id, [])
        if not found:
            raise FileNotFoundError(f"{where}: no image in {root / 'images'} has a name that ends with {image_id}")
        if len(found) > 1:
            raise ValueError(f"{where}: two images have names that end with {image_id}: {found[0]}, {found[1]}")
        rows.append(
            {
                "image": str(found[0]),
                "image_id": image_id,
                "question": question,
                "question_id": question_id,
                "answers": answers[str(question_id)],
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


def _fields(where: str, item: Any, wanted: Mapping[str, Any]) -> list[Any]:
    """The values of the keys of wanted, {key: type or union of types}."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: wanted an object with {', '.join(wanted)}, got {type(item).__name__}")
    if missing := [key for key in wanted if key not in item]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}; it has: {', '.join(item)}")
    for key, kind in wanted.items():
        if not isinstance(item[key], kind) or isinstance(item[key], bool):  # a bool is an int to Python
            kinds = " or ".join(each.__name__ for each in get_args(kind) or (kind,))
            raise ValueError(f"{where}: {key} must be {kinds}, got {reprlib.repr(item[key])}")
    return [item[key] for key in wanted]


def _text(where: str, item: Any, key: str) -> str:
    """The text of a key, which is not empty."""
    (text,) = _fields(where, item, {key: str})
    if not text.strip():
        raise ValueError(f"{where}: {key} must be a text that is not empty, got {text!r}")
    return text


def _once(where: str, key: str, value: int | str, seen: dict[str, int | str]) -> None:
    """Adds an id to those seen, where 5 and "5" are the same; ids of two types would not fit into one column."""
    first = next(iter(seen.values()), value)
    if type(value) is not type(first):
        kinds = type(value).__name__, type(first).__name__
        raise ValueError(f"{where}: {key} {value!r} is {kinds[0]}, those before are {kinds[1]}")
    if str(value) in seen:
        raise ValueError(f"{where}: {key} {value} occurs twice")
    seen[str(value)] = value


def _answers(path: Path) -> dict[str, list[str]]:
    """{question_id: answers} of an annotation file."""
    answers, seen = {}, {}
    for where, item in _items(path, "annotations"):
        question_id, given = _fields(where, item, {"question_id": int | str, "answers": list})
        _once(where, "question_id", question_id, seen)
        texts = [_fields(f"{where}, answer {i}", answer, {"answer": str})[0] for i, answer in enumerate(given)]
        if len(given) < 2:  # the accuracy leaves one person out
            raise ValueError(f"{where}: wanted at least 2 answers, got {len(given)}")
        answers[str(question_id)] = texts
    return answers


def _image(folder: Path, name: Path, where: str) -> Path:
    """The path of an image below its folder, directly in it if its own folder is left out on disk."""
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{where}: image path {str(name)!r} leaves {folder}")
    for path in (folder / name, folder / name.name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{where}: there is no image {folder / name}")


def _regions(root: Path) -> dict[str, list[dict[str, Any]]]:
    """{file name: regions} of `regions.json`, a list of {image, elems: [{bb, caption}]}; empty without the file."""
    path = root / "regions.json"
    if not path.is_file():
        return {}
    document = _read(path)
    if not isinstance(document, list):
        raise ValueError(f"{path}: wanted a list, got {type(document).__name__}")
    found = {}
    for i, item in enumerate(document):
        where = f"{path}, item {i}"
        name, elements = _fields(where, item, {"image": str, "elems": list})
        regions = [_region(f"{where}, element {j}", element) for j, element in enumerate(elements)]
        found.setdefault(Path(name).name, []).extend(regions)
    return found


def _region(where: str, element: Any) -> dict[str, Any]:
    """The box and the phrase, the first of several, of an element."""
    box, phrase = _fields(where, element, {"bb": list, "caption": str | list})
    numbers = all(isinstance(e, int | float) and not isinstance(e, bool) and math.isfinite(e) for e in box)
    if not numbers or len(box) != 4 or min(box[2:]) <= 0:
        wanted = "4 numbers, x, y, and a width and height above 0"
        raise ValueError(f"{where}: bb must be {wanted}, got {reprlib.repr(box)}")
    if isinstance(phrase, list):
        phrase = phrase[0] if phrase else ""
    return {"box": [float(edge) for edge in box], "phrase": _text(where, {"caption": phrase}, "caption")}


def _split_of(path: Path) -> str | None:
    """The split that a file name has as a word of its own; None if there is none or more than one."""
    words = set(SPLIT.findall(path.name))
    return words.pop() if len(words) == 1 else None


def _split_file(root: Path, kind: str, split: str) -> Path:
    """The file of a kind, "questions" or "annotations", that is for the split or for all."""
    files = sorted(root.glob(f"*{kind}.json"))
    listed = ", ".join(path.name for path in files) or "none"
    plain = [path for path in files if _split_of(path) is None]
    if plain and len(plain) < len(files):
        raise ValueError(
            f"wanted *{kind}.json in {root} either with or without a split in all names, there are: {listed}"
        )
    chosen = plain or [path for path in files if _split_of(path) == split]
    if not chosen:
        raise FileNotFoundError(f"wanted one *{split}*{kind}.json (VQA v2 layout) in {root}, there are: {listed}")
    if len(chosen) > 1:
        names = ", ".join(path.name for path in chosen)
        raise ValueError(f"wanted one *{kind}.json of split {split!r} in {root}, there are: {names}")
    return chosen[0]
