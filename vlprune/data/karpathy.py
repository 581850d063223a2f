"""Karpathy's splits: `dataset_*.json`, an object with a list `images`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprune.data.annotations import fields, items, no_split, once, text
from vlprune.data.images import ImageFolder
from vlprune.data.regions import read_regions
from vlprune.data.source import Directory

REGIONS = "regions.json"


def find(directory: Directory) -> list[Path]:
    """The annotation files of this layout in a directory."""
    return directory.named("dataset_*.json")


def read(directory: Directory, files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    """The pairs of a split; `restval` counts as train (Karpathy and Li 2015, arXiv:1412.2306).

    image_id is cocoid, else imgid, else filename. The regions are those of a `regions.json` in the directory.
    """
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{directory.name}: wanted one dataset_*.json, found {names}; name one of them as the data")
    folder, rows, splits, seen = ImageFolder(directory.root), [], set(), {}
    for where, item in items(files[0], "images"):
        name, own_split, sentences = fields(where, item, {"filename": str, "split": str, "sentences": list})
        (image_id,) = fields(where, item, {next((k for k in ("cocoid", "imgid") if k in item), "filename"): int | str})
        once(where, "image_id", image_id, seen)
        own_split = "train" if own_split == "restval" else own_split
        splits.add(own_split)
        if own_split != split:
            continue
        captions = [text(f"{where}, sentence {i}", s, "raw") for i, s in enumerate(sentences)]
        if not captions:
            raise ValueError(f"{where}: an image without captions")
        (above,) = fields(where, {"filepath": "", **item}, {"filepath": str})
        picture = folder.find(f"{above}/{name}" if above else name, where)
        rows.append({"image": picture, "image_id": image_id, "captions": captions})
    if not rows:
        raise no_split(files[0], split, splits)
    boxes = read_regions(directory.root / REGIONS)
    for row in rows:
        row["regions"] = boxes.get(Path(row["image"].path).name, [])
    return rows
