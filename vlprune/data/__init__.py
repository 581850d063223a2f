"""Data sets by name, file or hub id, and the calibration batches that are drawn from them."""

from __future__ import annotations

from functools import lru_cache, partial

from datasets import Dataset

from vlprune.data import broken, layouts, lists, tables
from vlprune.data.calibration import CalibrationBatches, StreamedBatches, UsesRegions, too_few
from vlprune.data.fingerprint import Fingerprint, data_fingerprint, take_fingerprint
from vlprune.data.images import ImageFolder, warn_of
from vlprune.data.layouts import READERS_VERSION
from vlprune.data.opened import opened_images
from vlprune.data.source import DATASETS, Directory, Hub, cache_home, find_source

__all__ = [
    "DATASETS",
    "READERS_VERSION",
    "CalibrationBatches",
    "StreamedBatches",
    "annotation_files",
    "cache_home",
    "calibration_batches",
    "data_fingerprint",
    "left_out",
    "left_out_of_calibration",
    "load_answers",
    "load_pairs",
    "load_questions",
    "take_data_fingerprint",
]


def load_pairs(name: str, split: str, limit: int | None = None, *, skip_broken: bool = False) -> Dataset:
    """Images with captions: the first `limit` rows of a split.

    Columns: image (PIL, RGB, opened when the row is read), image_id (int or str), captions (list of str), regions (list
    of {box, phrase}; a box is [x, y, width, height] in pixels).

    Args:
        name: name of the data (see `find_source`).
        split: one split, or several as in "train+val", whose rows come one after another.
        limit: number of rows; None: all.
        skip_broken: decode every image now and leave out those that are missing or cannot be read, with a warning;
            `left_out` lists them.

    Raises:
        FileNotFoundError: no known layout; a missing image.
        ValueError: an unknown name or split, a malformed annotation; when a row is read, an image that is none.
        OSError: a file that cannot be read for now, such as on a disk that fails.
    """
    return _load(name, "pairs", split, limit, skip_broken)


def load_questions(name: str, split: str, limit: int | None = None, *, skip_broken: bool = False) -> Dataset:
    """Questions about images: the first `limit` rows of a split, for which no other split is needed.

    Columns: image, image_id, question, question_id, answers (list of str, empty where a test split has none), weight
    (of the question in a training loss: 1, and 0.5 for those of Visual Genome). Arguments and errors are those of
    `load_pairs`.
    """
    return _load(name, "questions", split, limit, skip_broken)


def left_out(name: str, kind: layouts.Kind, split: str, limit: int | None = None) -> list[str]:
    """What `skip_broken` leaves out: of each missing or unreadable image the annotation and the reason.

    Paths are those below the data's directory, so that the lines are the same wherever it lies. The images are decoded
    once for the same files; the lines are kept in $VLPRUNE_CACHE.

    Raises:
        OSError: a file that cannot be read for now, which is no broken image.
    """
    source = find_source(name)
    return list(_broken(source, kind, split, take_fingerprint(source), limit).values())


def load_answers(name: str) -> list[str] | None:
    """The answers of `answer_list.json`, which VQA lists come with; None where there is none."""
    source = find_source(name)
    return lists.read_answers(source) if isinstance(source, Directory) else None


def take_data_fingerprint(name: str) -> Fingerprint:
    """What is known of the present contents of the data of a name; errors as of `data_fingerprint`."""
    return take_fingerprint(find_source(name))


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
    threads: int = 0,
) -> CalibrationBatches | StreamedBatches:
    """Batches `first` to `first + n_batches` of the shuffled training pairs, with regions if the model uses them.

    Hub data sets and directories of shards (tar, parquet, arrow) are read as streams, so never whole.

    Args:
        name: name of the data (see `find_source`).
        model: the model, whose `uses_regions` says whether regions are drawn.
        n_batches: number of batches.
        batch_size: number of pairs in a batch.
        seed: seed of all random choices.
        first: number of the first batch.
        skip_broken: put other pairs in the place of images that are missing or cannot be read, with a warning after
            each walk; the attribute `broken` lists them. Images that are not drawn are not looked at.
        threads: number of batches whose images are opened at a time, while others are used (0: none); of a stream, one.
    """
    source = find_source(name)
    noted = [] if skip_broken else None
    if (isinstance(source, Hub) or layouts.find_layout(source, "pairs") is None) and tables.streams(source):
        rows, image, captions = tables.stream(source, "train")
        folder = ImageFolder(source.root) if isinstance(source, Directory) else None
        return StreamedBatches(rows, image, captions, name, folder, n_batches, batch_size, seed, first, noted, threads)
    examples = _read(source, "pairs", "train", take_fingerprint(source)[:2])
    pairs = examples.data
    if examples.problems:
        if noted is None:
            raise FileNotFoundError(next(iter(examples.problems.values())))
        noted += examples.problems.values()
        pairs = pairs.select([row for row in range(len(pairs)) if row not in examples.problems])
    if len(pairs) < batch_size:
        raise ValueError(too_few(name, batch_size, len(pairs)))
    return CalibrationBatches(pairs, name, n_batches, batch_size, seed, first, model.uses_regions, noted, threads)


def left_out_of_calibration(name: str, *, n_batches: int, batch_size: int, seed: int) -> list[str]:
    """The images in whose places the first batches of a calibration that skips broken ones have others.

    Lines as those of `left_out`. The images of these batches are decoded, once in a process for the same files.

    Raises:
        ValueError: data that is none, or too few images that can be read.
        OSError: a file that cannot be read for now, which is no broken image.
    """
    source = find_source(name)
    return list(_replaced(source, take_fingerprint(source), n_batches, batch_size, seed))


@lru_cache(maxsize=32)
def _replaced(
    source: Directory | Hub, _known: Fingerprint, n_batches: int, batch_size: int, seed: int
) -> tuple[str, ...]:
    batches = calibration_batches(
        source.name, _NoRegions(), n_batches=n_batches, batch_size=batch_size, seed=seed, skip_broken=True
    )
    for _ in batches:  # which fills the list of the broken ones
        pass
    return tuple(broken.below(line, source) for line in batches.broken or ())


class _NoRegions:
    """A model as `calibration_batches` looks at it; regions change nothing of which images are drawn."""

    def __init__(self) -> None:
        self.uses_regions = False


@lru_cache(maxsize=8)
def _read(source: Directory | Hub, kind: layouts.Kind, split: str, _known: tuple[str, str]) -> layouts.Examples:
    """What a reader reads, once per process: a worker runs many cells on the same data."""
    return layouts.read(source, kind, split)


@lru_cache(maxsize=8)
def _broken(
    source: Directory | Hub, kind: layouts.Kind, split: str, known: Fingerprint, limit: int | None
) -> dict[int, str]:
    """{row: annotation and reason} of the images that cannot be read, looked for once per process."""
    return broken.left_out(source, known, kind, split, limit, partial(_read, source, kind, split, known[:2]))


def _load(name: str, kind: layouts.Kind, split: str, limit: int | None, skip_broken: bool) -> Dataset:
    source = find_source(name)
    known = take_fingerprint(source)
    examples = _read(source, kind, split, known[:2])
    size = len(examples.data)
    if skip_broken:
        missing = _broken(source, kind, split, known, limit)
        if missing:
            warn_of(list(missing.values()), f"{name}, {split}")
        rows = [row for row in range(size) if row not in missing][:limit]
        return examples.data.select(rows).with_transform(opened_images)
    size = size if limit is None else min(limit, size)
    for row, problem in examples.problems.items():
        if row < size:
            raise FileNotFoundError(problem)
    data = examples.data if limit is None else examples.data.select(range(size))
    return data.with_transform(opened_images)
