"""Data sets by name, file or hub id, and the batches that calibration draws from them."""

from __future__ import annotations

from functools import lru_cache

from datasets import Dataset

from vlprune.data import layouts, lists, tables
from vlprune.data.calibration import CalibrationBatches, StreamedBatches, UsesRegions, too_few
from vlprune.data.digest import data_digest
from vlprune.data.images import ImageFolder, open_images, warn_of
from vlprune.data.source import DATASETS, Directory, Hub, cache_home, data_root, find_source

__all__ = [
    "DATASETS",
    "CalibrationBatches",
    "StreamedBatches",
    "annotation_files",
    "broken_images",
    "cache_home",
    "calibration_batches",
    "data_digest",
    "data_root",
    "load_answers",
    "load_pairs",
    "load_questions",
]


def load_pairs(name: str, split: str, limit: int | None = None, *, skip_broken: bool = False) -> Dataset:
    """Images with captions; the first `limit` of a split.

    Columns: image (PIL, RGB, read on access), image_id (int or str), captions (list of str), regions (list of {box,
    phrase}; a box is [x, y, width, height] in pixels).

    Args:
        name: of the data (see `find_source`).
        split: one split or several, `train+val`, one after another.
        limit: how many rows; None: all.
        skip_broken: decode every image now and leave out those that are missing or cannot be read, with a warning;
            `broken_images` lists them.

    Raises:
        FileNotFoundError: no known layout; a missing image.
        ValueError: an unknown name or split, a malformed annotation. On access: an image that cannot be read.
    """
    return _load(name, "pairs", split, limit, skip_broken)


def load_questions(name: str, split: str, limit: int | None = None, *, skip_broken: bool = False) -> Dataset:
    """Questions about images; the first `limit` of a split.

    Columns: image, image_id, question, question_id, answers (list of str, empty where a test split has none), weight
    (of the question in a training loss: 1, of Visual Genome 0.5). Arguments and errors are those of `load_pairs`.
    """
    return _load(name, "questions", split, limit, skip_broken)


def broken_images(name: str, kind: layouts.Kind, split: str, limit: int | None = None) -> list[str]:
    """What `skip_broken` leaves out: of each missing or unreadable image the annotation and the reason."""
    return _readable(find_source(name), kind, split, data_digest(name), limit)[1]


def load_answers(name: str) -> list[str] | None:
    """The answers of `answer_list.json`, which VQA lists come with; None where there is none."""
    source = find_source(name)
    return lists.read_answers(source) if isinstance(source, Directory) else None


def annotation_files(name: str, kind: layouts.Kind) -> list[str]:
    """The names of the files that examples are read from, the paths of tables, or the hub id."""
    return layouts.annotation_files(find_source(name), kind)


def calibration_batches(
    name: str,
    model: UsesRegions,
    *,
    n_batches: int,
    batch_size: int,
    seed: int,
    first: int = 0,
    skip_broken: bool = False,
) -> CalibrationBatches | StreamedBatches:
    """Batches `first` to `first + n_batches` of the shuffled training pairs, with regions if the model uses them.

    Hub data sets and directories of shards (tar, parquet, arrow) are read as streams, so never whole.

    Args:
        name: of the data (see `find_source`).
        model: whether it uses regions.
        n_batches: how many.
        batch_size: pairs a batch.
        seed: of all random choices.
        first: number of the first batch.
        skip_broken: put other pairs in the place of images that are missing or cannot be read, with a warning after
            each walk; the attribute `broken` lists them. Images that are not drawn are not looked at.
    """
    source = find_source(name)
    broken = [] if skip_broken else None
    if (isinstance(source, Hub) or layouts.find_layout(source, "pairs") is None) and tables.streams(source):
        rows, image, captions = tables.stream(source, "train")
        folder = ImageFolder(source.root) if isinstance(source, Directory) else None
        return StreamedBatches(rows, image, captions, name, folder, n_batches, batch_size, seed, first, broken)
    examples = _read(source, "pairs", "train", data_digest(name))
    pairs = examples.data
    if examples.problems:
        if broken is None:
            raise FileNotFoundError(next(iter(examples.problems.values())))
        broken += examples.problems.values()
        pairs = pairs.select([row for row in range(len(pairs)) if row not in examples.problems])
    if len(pairs) < batch_size:
        raise ValueError(too_few(name, batch_size, len(pairs)))
    return CalibrationBatches(pairs, name, n_batches, batch_size, seed, first, model.uses_regions, broken)


@lru_cache(maxsize=8)
def _read(source: Directory | Hub, kind: layouts.Kind, split: str, _digest: str) -> layouts.Examples:
    """What a reader reads, once per process: a worker runs many cells on the same data."""
    return layouts.read(source, kind, split)


@lru_cache(maxsize=8)
def _readable(
    source: Directory | Hub, kind: layouts.Kind, split: str, digest: str, limit: int | None
) -> tuple[list[int], list[str]]:
    """The rows whose images can be read and what is wrong with the others, once per process."""
    return layouts.find_broken(_read(source, kind, split, digest), limit)


def _load(name: str, kind: layouts.Kind, split: str, limit: int | None, skip_broken: bool) -> Dataset:
    source, digest = find_source(name), data_digest(name)
    examples = _read(source, kind, split, digest)
    if skip_broken:
        rows, broken = _readable(source, kind, split, digest, limit)
        if broken:
            warn_of(broken, f"{name}, {split}")
        return examples.data.select(rows).with_transform(open_images)
    size = len(examples.data) if limit is None else min(limit, len(examples.data))
    for row, problem in examples.problems.items():
        if row < size:
            raise FileNotFoundError(problem)
    data = examples.data if limit is None else examples.data.select(range(size))
    return data.with_transform(open_images)
