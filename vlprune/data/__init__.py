"""Data sets by name or directory, and the batches that calibration draws from them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from datasets import Dataset
from filelock import FileLock

from vlprune.batch import Batch
from vlprune.config import unknown
from vlprune.data import layouts, scenes

DATASETS = ("scenes",)
EDGE = 4096  # bytes of an image's start, and of its end, that data_digest reads


class _UsesRegions(Protocol):
    uses_regions: bool


def cache_home() -> Path:
    """Where generated data goes: $VLPRUNE_CACHE, else ~/.cache/vlprune."""
    return Path(os.environ.get("VLPRUNE_CACHE", Path.home() / ".cache" / "vlprune"))


def data_root(name: str) -> Path:
    """The directory of a data set; `scenes` is generated on first use.

    Raises:
        ValueError: neither a directory nor an embedded data set.
    """
    if name in DATASETS:
        return _scenes_root()
    if not Path(name).is_dir():
        raise ValueError(f"{unknown('data set', name, DATASETS)}; and there is no such directory")
    return Path(name)


def data_digest(name: str) -> str:
    """Short hash of a data set.

    Of a directory: its annotation files, and of each image the name, the size and the first and last 4 KiB. A change
    in the middle of a large image that keeps its size goes unseen: reading all of COCO would take minutes every time.
    The embedded data sets are known by their versions.
    """
    if name in DATASETS:
        return f"{name}-{scenes.VERSION}"
    root, sha = data_root(name), hashlib.sha256()
    for path in sorted(root.glob("*.json")):
        sha.update(path.read_bytes())
    for path in sorted((root / "images").rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            sha.update(f"{path.relative_to(root)} {size}\n".encode())
            with path.open("rb") as file:
                sha.update(file.read(EDGE))
                file.seek(max(EDGE, size - EDGE))
                sha.update(file.read(EDGE))
    return sha.hexdigest()[:16]


def _scenes_root() -> Path:
    root = cache_home() / f"scenes-{scenes.VERSION}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{root}.lock"):
            if not root.is_dir():
                for left in root.parent.glob(f"{root.name}.part-*"):  # by a process that was killed
                    shutil.rmtree(left)
                part = Path(tempfile.mkdtemp(dir=root.parent, prefix=f"{root.name}.part-"))
                try:
                    scenes.write(part)
                    os.rename(part, root)
                except BaseException:
                    shutil.rmtree(part, ignore_errors=True)
                    raise
    return root


def load_pairs(name: str, split: str, limit: int | None = None) -> Dataset:
    """Images with captions: columns image, image_id, captions, regions; the first `limit` of a split."""
    return _first(_read(layouts.load_pairs, data_root(name), split, data_digest(name)), limit)


def load_questions(name: str, split: str, limit: int | None = None) -> Dataset:
    """Questions about images: columns image, image_id, question, question_id, answers; the first `limit` of a split."""
    return _first(_read(layouts.load_questions, data_root(name), split, data_digest(name)), limit)


@lru_cache(maxsize=8)
def _read(reader: Callable[[Path, str], Dataset], root: Path, split: str, _digest: str) -> Dataset:
    """What a reader reads, once per process: a worker runs many cells on the same data."""
    return reader(root, split)


def _first(data: Dataset, limit: int | None) -> Dataset:
    return data if limit is None else data.select(range(min(limit, len(data))))


@dataclass(frozen=True)
class CalibrationBatches:
    """Batches of a data set's training pairs, the same every time they are walked through.

    Attributes:
        pairs: columns image, captions, regions.
        n_batches: how many.
        batch_size: pairs a batch.
        seed: of the order, the caption and the region of each image.
        first: number of the first batch in the endless sequence of the seed.
        regions: whether to draw one region an image.
    """

    pairs: Dataset
    n_batches: int
    batch_size: int
    seed: int
    first: int
    regions: bool

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        per_epoch = max(1, len(self.pairs) // self.batch_size)
        for number in range(self.first, self.first + self.n_batches):
            epoch, position = divmod(number, per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
            rows = order[position * self.batch_size : (position + 1) * self.batch_size]
            rng = np.random.default_rng([self.seed, epoch, position])
            examples = [self.pairs[int(row)] for row in rows]
            texts = [str(rng.choice(example["captions"])) for example in examples]
            regions = []
            if self.regions:
                for i, example in enumerate(examples):
                    if example["regions"]:
                        region = example["regions"][int(rng.integers(len(example["regions"])))]
                        scale = (*example["image"].size, *example["image"].size)
                        box = [edge / side for edge, side in zip(region["box"], scale, strict=True)]
                        regions.append((i, box, region["phrase"]))
            yield Batch([example["image"] for example in examples], texts, regions)


def calibration_batches(
    name: str, model: _UsesRegions, *, n_batches: int, batch_size: int, seed: int, first: int = 0
) -> CalibrationBatches:
    """Batches `first` to `first + n_batches` of the shuffled training pairs, with regions if the model uses them."""
    pairs = load_pairs(name, "train")
    if len(pairs) < batch_size:
        raise ValueError(f"a calibration batch needs {batch_size} training images, {name} has {len(pairs)}")
    return CalibrationBatches(pairs, n_batches, batch_size, seed, first, model.uses_regions)
