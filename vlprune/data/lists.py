"""Annotation lists of ALBEF, BLIP and X-VLM: JSON lists of {image, caption} or {image, question, answer}."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.files import image_ids
from vlprune.data.annotations import (
    answer_type,
    check_whole,
    fields,
    first_entry,
    list_items,
    no_split,
    once,
    shown,
    split_of,
    text,
    texts,
)
from vlprune.data.images import ImageFolder
from vlprune.data.regions import box_of, regions_of
from vlprune.data.source import Directory

log = logging.getLogger(__name__)
ANSWERS = "answer_list.json"
OTHERS = frozenset(("bbox", "images", "question", "sentence", "sentences", "text"))  # of RefCOCO, NLVR2 and VQA lists
VG_WEIGHT = 0.5  # of a question of Visual Genome, by MULTIFLOW (arXiv:2404.05621); BLIP's own code has 0.2


def find_pairs(directory: Directory) -> list[Path]:
    """The caption and region lists in a directory; `regions.json` beside a Karpathy file belongs to that."""
    beside = directory.named("dataset_*.json")
    lists = [path for path in directory.named("*.json") if not (beside and path.name == "regions.json")]
    return [path for path in lists if _is_pair(first_entry(path))]


def find_questions(directory: Directory) -> list[Path]:
    """The question lists in a directory."""
    entries = [(path, first_entry(path)) for path in directory.named("*.json")]
    return [path for path, entry in entries if isinstance(entry, dict) and {"image", "question"} <= entry.keys()]


def read_pairs(directory: Directory, files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    """The pairs of a split, one row for each image, in the order of their first captions.

    An item has an image and a caption or several, possibly with a box or a box for each (`bb`), or regions (`elems`);
    regions without a caption of the whole image lend it their phrases. An image_id is a whole number of the list, else
    the one that the file name ends with, else the path (see `image_ids`).
    """
    folder, rows, owners, bare = ImageFolder(directory.root), {}, {}, ""
    for path in _files(directory, files, split):
        optional = split != "train" and split_of(path) == split
        for where, item in list_items(path):
            (name,) = fields(where, item, {"image": str})
            given = {key: item[key] for key in ("image_id", "img_id") if key in item}
            for key, value in given.items():
                fields(where, item, {key: int | str})
                if owners.setdefault((key, value), name) != name:
                    raise ValueError(f"{where}: {key} {shown(value)} is that of image {shown(owners[key, value])}, too")
            if name not in rows:
                rows[name] = {**given, "image": folder.find(name, where), "captions": [], "regions": []}
            regions = regions_of(where, item) if "elems" in item else []
            if "caption" in item:
                captions = texts(where, item, "caption")
                regions += _boxes(where, item.get("bb"), captions)
            elif regions or not optional:
                captions = [region["phrase"] for region in regions] or texts(where, item, "caption")
            else:
                captions, bare = [], bare or where
            rows[name]["captions"] += captions
            rows[name]["regions"] += regions
    if bare and any(row["captions"] for row in rows.values()):
        raise ValueError(f"{bare}: lacks caption, which other items have")
    if bare:
        log.warning(f"{bare} and the others have no captions: the images can be captioned, not scored")
    ids = image_ids([{**row, "image": name} for name, row in rows.items()])
    return [
        {key: row[key] for key in ("image", "captions", "regions")} | {"image_id": i}
        for row, i in zip(rows.values(), ids)
    ]


def read_questions(directory: Directory, files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    """The questions of a split; a list without a split in its name is one by its own name, `vg_qa.json` is `vg`.

    A test split needs no answers. A question of Visual Genome (`dataset` is "vg") weighs VG_WEIGHT, and where there are
    such, an image_id is the path, as the numbers of its images are not those of COCO. The ids of its questions, and
    those that a list lacks, are counted down from -1.
    """
    folder, rows, names, seen = ImageFolder(directory.root), [], [], {}
    for path in _files(directory, files, split):
        for where, item in list_items(path):
            (name,) = fields(where, item, {"image": str})
            of_vg = item.get("dataset") == "vg"
            known = {"question_id": -1 - len(rows)} | ({} if of_vg else item)
            (question_id,) = fields(where, known, {"question_id": int | str})
            once(where, "question_id", question_id, seen)
            answers = [] if "answer" not in item and split.startswith("test") else texts(where, item, "answer")
            names.append(name)
            rows.append(
                {
                    "image": folder.find(name, where),
                    "question": text(where, item, "question"),
                    "question_id": question_id,
                    "answers": answers,
                    "answer_type": answer_type(where, item),
                    "weight": VG_WEIGHT if of_vg else 1.0,
                }
            )
    has_vg = any(row["weight"] == VG_WEIGHT for row in rows)
    ids = names if has_vg else image_ids([{"image": name} for name in names])
    return [row | {"image_id": i} for row, i in zip(rows, ids)]


def answer_files(root: Path) -> list[Path]:
    """The places of the answer list below a directory, of which the first that is there is read."""
    return [folder / ANSWERS for folder in (root, root / "annotations")]


def read_answers(directory: Directory) -> list[str] | None:
    """The answers of `answer_list.json`, None without the file.

    Raises:
        ValueError: not a list of texts.
    """
    found = [path for path in answer_files(directory.root) if path.is_file()]
    return [text(where, {"answer": item}, "answer") for where, item in list_items(found[0])] if found else None


def _is_pair(entry: Any) -> bool:
    """Whether a list is to be read as one of pairs, if only to say what it lacks: "Image" is meant to be "image"."""
    return (
        isinstance(entry, dict)
        and any(key.lower() == "image" for key in entry)
        and ("caption" in entry or not OTHERS & entry.keys())
    )


def _boxes(where: str, boxes: Any, captions: list[str]) -> list[dict[str, Any]]:
    """The regions of `bb`: none, one box, or one for each caption."""
    if boxes is None:
        return []
    several = boxes if isinstance(boxes, list) and boxes and isinstance(boxes[0], list) else [boxes]
    if len(several) not in (1, len(captions)):
        raise ValueError(f"{where}: {len(several)} boxes in bb for {len(captions)} captions")
    return [{"box": box_of(where, box), "phrase": phrase} for box, phrase in zip(several, captions)]


def _files(directory: Directory, files: Sequence[Path], split: str) -> list[Path]:
    """The lists of a split: that with its name, or those called so; lists without a split in any name make up train."""
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(split_of(path) or path.stem.removesuffix("_qa"), []).append(path)
    if not any(map(split_of, files)):
        named["train"] = list(files)
        if split == "train":
            return named["train"]
    chosen = named.get(split, [])
    if not chosen:
        check_whole(path for path in directory.named("*.json") if split_of(path) == split)
        raise no_split(directory.name, split, named)
    if len(chosen) > 1:
        names = ", ".join(path.name for path in chosen)
        example = directory.root / f"{chosen[0].stem.split('_')[0]}_*.json"
        raise ValueError(
            f"{directory.name} has several lists of split {split!r}: {names}; name those of one, as {example}"
        )
    return chosen
