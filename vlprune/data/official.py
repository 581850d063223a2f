"""The files that COCO and VQA publish: `captions_*.json`, `*questions.json` with `*annotations.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprune.data.annotations import answer_type, fields, items, no_split, once, shown, split_of, text
from vlprune.data.images import ImageFolder
from vlprune.data.source import Directory


def find_captions(directory: Directory) -> list[Path]:
    """The caption files in a directory, one for each split."""
    return directory.named("captions_*.json")


def find_questions(directory: Directory) -> list[Path]:
    """The question files in a directory."""
    return directory.named("*questions.json")


def read_captions(directory: Directory, files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    """The pairs of a split: `images` of {id, file_name}, `annotations` of {image_id, caption}.

    Images may lie in a folder that the file's name gives (`captions_val2014.json`: `val2014/`).
    """
    named = {name: path for path in files if (name := split_of(path))}
    if split not in named:
        raise no_split(directory.name, split, named)
    path, folder = named[split], ImageFolder(directory.root)
    if sum(split_of(each) == split for each in files) > 1:
        names = ", ".join(each.name for each in files if split_of(each) == split)
        raise ValueError(
            f"{directory.name} has several caption files of split {split!r}: {names}; name one as the data"
        )
    rows, seen = {}, {}
    for where, item in items(path, "images"):
        image_id, name = fields(where, item, {"id": int | str, "file_name": str})
        once(where, "id", image_id, seen)
        picture = folder.find(name, where, _subfolder(path))
        rows[str(image_id)] = {"image": picture, "image_id": image_id, "captions": [], "regions": []}
    for where, item in items(path, "annotations"):
        (image_id,) = fields(where, item, {"image_id": int | str})
        if str(image_id) not in rows:
            raise ValueError(f"{where}: image_id {shown(image_id)} is not among the images")
        rows[str(image_id)]["captions"].append(text(where, item, "caption"))
    for row in rows.values():
        if not row["captions"]:
            raise ValueError(f"{row['image'].where}: an image without captions")
    return list(rows.values())


def read_questions(directory: Directory, files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    """The questions of a split: `questions` of {question_id, image_id, question}, `annotations` with {answers}.

    The files are those whose names have the split as a word of its own (`v2_mscoco_train2014_annotations.json`), or the
    only one, whose name has none; then every question carries a `split`. A test split needs no annotations (test2015 is
    `test`, test-dev2015 is `test-dev`). An image belongs to the image_id, a whole number, that its file name ends with.
    """
    asked = _split_file(directory, files, "questions", split)
    answered, answers, types = None, {}, {}
    given = directory.named("*annotations.json")
    if not split.startswith("test") or any(split_of(path) in (None, split) for path in given):
        answered = _split_file(directory, given, "annotations", split)
        answers, types = _answers(answered)
    folder, rows, seen, splits = ImageFolder(directory.root), [], {}, set()
    for where, item in items(asked, "questions"):
        question = text(where, item, "question")
        question_id, image_id = fields(where, item, {"question_id": int | str, "image_id": int | str})
        once(where, "question_id", question_id, seen)
        if not re.fullmatch("[0-9]{1,18}", str(image_id)):
            raise ValueError(f"{where}: image_id must be a whole number, got {shown(image_id)}")
        if "split" not in item and split_of(asked) is None:
            raise ValueError(f"{where}: lacks split, which every question needs as the file name has none")
        (own_split,) = fields(where, {"split": split, **item}, {"split": str})
        splits.add(own_split)
        if own_split != split:
            continue
        if answered is not None and str(question_id) not in answers:
            raise ValueError(f"{where}: question {shown(question_id)} has no answers in {answered}")
        rows.append(
            {
                "image": folder.numbered(int(image_id), where, _subfolder(asked)),
                "image_id": int(image_id),
                "question": question,
                "question_id": question_id,
                "answers": answers.get(str(question_id), []),
                "answer_type": types.get(str(question_id)),
                "weight": 1.0,
            }
        )
    if not rows:
        raise no_split(asked, split, splits)
    return rows


def _answers(path: Path) -> tuple[dict[str, list[str]], dict[str, str | None]]:
    """{question_id: answers} and {question_id: answer type, if it is said} of an annotation file."""
    answers, types, seen = {}, {}, {}
    for where, item in items(path, "annotations"):
        question_id, given = fields(where, item, {"question_id": int | str, "answers": list})
        once(where, "question_id", question_id, seen)
        texts = [answer.get("answer") if isinstance(answer, dict) else None for answer in given]
        if not all(isinstance(each, str) and each.isascii() for each in texts):
            for i, answer in enumerate(given):
                fields(f"{where}, answer {i}", answer, {"answer": str})
        if not given:
            raise ValueError(f"{where}: wanted at least one answer, got none")
        answers[str(question_id)], types[str(question_id)] = texts, answer_type(where, item)
    return answers, types


def _subfolder(path: Path) -> str:
    """The image folder that the name of a file speaks of: train2014, test2015 for test-dev2015; else empty."""
    found = re.search(r"(?:^|[^a-zA-Z])(train|val|test)(?:-dev)?(20\d\d)(?!\d)", path.name)
    return f"{found[1]}{found[2]}" if found else ""


def _split_file(directory: Directory, files: Sequence[Path], kind: str, split: str) -> Path:
    """The file of a kind, "questions" or "annotations", that is for the split or for all."""
    listed = ", ".join(path.name for path in files) or "none"
    plain = [path for path in files if split_of(path) is None]
    if plain and len(plain) < len(files):
        raise ValueError(
            f"wanted *{kind}.json in {directory.name} either with or without a split in all names, there are: {listed}"
        )
    chosen = plain or [path for path in files if split_of(path) == split]
    if not chosen:
        splits = ", ".join(sorted({name for path in files if (name := split_of(path))})) or "none"
        raise ValueError(f"{directory.name} has no *{kind}.json of split {split!r}; it has: {splits} ({listed})")
    if len(chosen) > 1:
        names = ", ".join(path.name for path in chosen)
        raise ValueError(f"wanted one *{kind}.json of split {split!r} in {directory.name}, there are: {names}")
    return chosen[0]
