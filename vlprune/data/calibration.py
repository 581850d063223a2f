"""Batches of training pairs for calibration."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any, Protocol, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset
from huggingface_hub import HfFileSystem
from PIL.Image import Image

from vlprune.batch import Batch
from vlprune.data.ahead import ahead
from vlprune.data.decode import UnreadableImage, open_image
from vlprune.data.images import ImageFolder, warn_of
from vlprune.data.tables import texts_of

T = TypeVar("T")
BUFFER = 1000  # rows of a stream among which the next one is drawn


class UsesRegions(Protocol):
    """What the calibration batches depend on in a model.

    Attributes:
        uses_regions: whether its losses use regions, boxes with phrases, of the images.
    """

    uses_regions: bool


@dataclass(frozen=True)
class CalibrationBatches:
    """Batches of a data set's training pairs, the same every time they are walked through.

    Attributes:
        pairs: the training pairs, with columns image ({where, path or bytes}), captions, regions.
        name: name of the data set, for warnings.
        n_batches: number of batches.
        batch_size: number of pairs in a batch.
        seed: seeds the order of the images, and the choice of a caption and a region of each.
        first: number of the first batch in the endless sequence of the seed.
        regions: whether to draw one region of each image.
        broken: list in which images that cannot be read are noted, other pairs taking their places; None: they are
            errors.
        threads: number of batches whose images are opened at a time, while others are used; they change nothing.
    """

    pairs: Dataset
    name: str
    n_batches: int
    batch_size: int
    seed: int
    first: int
    regions: bool
    broken: list[str] | None = None
    threads: int = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.first, self.first + self.n_batches)
        yield from ahead((partial(self._drawn, number) for number in numbers), self.threads)
        if self.broken:
            warn_of(self.broken, self.name)

    def _drawn(self, number: int) -> Batch:
        """The batch of a number in the endless sequence of the seed."""
        epoch, position = divmod(number, max(1, len(self.pairs) // self.batch_size))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        rng = np.random.default_rng([self.seed, epoch, position])
        return _batch(list(self._read(rows, [self.seed, epoch, position, 1])), rng, self.regions)

    def _read(self, rows: np.ndarray, seed: list[int]) -> Iterator[tuple[Mapping[str, Any], Image]]:
        """The pairs of rows with their pictures; in the place of a broken one another that is not among the rows."""
        spare = iter(())
        for row in rows:
            while True:
                pair = self.pairs[int(row)]
                picture = _opened(pair["image"], self.broken)
                if picture is not None:
                    yield pair, picture
                    break
                if not isinstance(spare, filter):
                    others = np.random.default_rng(seed).permutation(len(self.pairs))
                    spare = filter(lambda other: other not in rows, others)
                row = next(spare, None)
                if row is None:
                    raise ValueError(f"too few images can be read for a batch of {len(rows)}: {self.broken}")


@dataclass(frozen=True)
class StreamedBatches:
    """Batches of a stream of training pairs, the same every time they are walked through.

    The order of the shards is random, and each next row is drawn among BUFFER ones, which is less random than
    `CalibrationBatches` is; the rows before the first batch are read, not decoded. Streams have no regions, and several
    rows of one image are several pairs.

    Attributes:
        rows: the stream.
        image: name of its column of images, {path or bytes}.
        captions: name of its column of texts.
        name: name of the data set, for errors.
        folder: the images of a directory, whose stream may name them instead of holding them; None: a stream of the
            hub.
        n_batches: number of batches.
        batch_size: number of pairs in a batch.
        seed: seeds the order of the images, and the choice of a caption of each.
        first: number of the first batch in the endless sequence of the seed.
        broken: list in which images that cannot be read are noted, the next rows taking their places; None: they are
            errors.
        threads: 0: each batch is read when it is asked for; else the next one is, while another is used.
    """

    rows: IterableDataset
    image: str
    captions: str
    name: str
    folder: ImageFolder | None
    n_batches: int
    batch_size: int
    seed: int
    first: int
    broken: list[str] | None = None
    threads: int = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        batches = self._read()
        yield from ahead((partial(next, batches) for _ in range(self.n_batches)), min(self.threads, 1))
        if self.broken:
            warn_of(self.broken, self.name)

    def _read(self) -> Iterator[Batch]:
        before, rows = self.first * self.batch_size, self._endless()
        next(islice(rows, before, before), None)
        later: deque[Mapping[str, Any]] = deque()  # rows that stood in for broken ones and are still to come themselves
        for number in range(self.first, self.first + self.n_batches):
            own = [later.popleft() if later else next(rows) for _ in range(self.batch_size)]
            pairs = [pair for row in own if (pair := self._opened(row))]
            spare = chain(tuple(later), self._kept(rows, later))
            while len(pairs) < self.batch_size:
                if pair := self._opened(next(spare)):
                    pairs.append(pair)
            yield _batch(pairs, np.random.default_rng([self.seed, number]), with_regions=False)

    def _endless(self) -> Iterator[Mapping[str, Any]]:
        """The rows of one epoch after another, in each the shards in another order and their rows mixed."""
        for epoch in count():
            rng, size = np.random.default_rng([self.seed, epoch]), 0
            order = rng.permutation(self.rows.num_shards)
            for row in _mixed(chain.from_iterable(self.rows.shard(len(order), int(i)) for i in order), rng):
                size += 1
                yield row
            if size < self.batch_size:
                raise ValueError(too_few(self.name, self.batch_size, size))

    def _kept(self, rows: Iterator[Mapping[str, Any]], later: deque) -> Iterator[Mapping[str, Any]]:
        """Further rows, put into later as well.

        Raises:
            ValueError: hardly any image can be read.
        """
        for row in islice(rows, BUFFER):
            later.append(row)
            yield row
        raise ValueError(
            f"{self.name}: hardly any of {BUFFER} images can be read, the first: {(self.broken or [''])[0]}"
        )

    def _opened(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Image] | None:
        image = row[self.image]
        if not isinstance(image, Mapping):
            image = {"bytes": None, "path": image} if isinstance(image, str) else {"bytes": image, "path": None}
        where = " ".join(str(row[key]) for key in ("__url__", "__key__") if key in row) or image["path"]
        where = f"{self.name}, {where or repr(row[self.captions])}"
        captions = texts_of(row[self.captions], f"{where}, {self.captions}")
        picture = _opened(self._found(image, where), self.broken)
        return None if picture is None else ({"captions": captions}, picture)

    def _found(self, image: Mapping[str, Any], where: str) -> dict[str, Any]:
        """{where, path, bytes} of an image: the stream's own bytes, a file of its directory or one of the hub.

        Raises:
            ValueError: a file elsewhere.
        """
        found, path = {**image, "where": where}, image["path"] or ""
        if image["bytes"] is not None or not path:
            return found
        if self.folder is not None and os.path.isabs(path):
            self.folder.stay(path, path, where)
        elif self.folder is not None:
            found["path"] = self.folder.find(path, where).path
        elif path.startswith("hf://"):
            [found["bytes"]] = HfFileSystem().cat_ranges([path], [None], [None])
        else:
            raise ValueError(f"{where}: a stream of the hub must hold its images, this row names {path!r}")
        return found


def _mixed(rows: Iterable[T], rng: np.random.Generator) -> Iterator[T]:
    """Rows in the order in which they are drawn from a buffer of BUFFER rows, which the next ones refill.

    Not `IterableDataset.shuffle`: its order may change with the version of `datasets`, and its threads read many shards
    ahead.
    """
    buffer: list[T] = []
    for row in rows:
        if len(buffer) < BUFFER:
            buffer.append(row)
            continue
        drawn = int(rng.integers(BUFFER))
        yield buffer[drawn]
        buffer[drawn] = row
    for drawn in rng.permutation(len(buffer)):
        yield buffer[drawn]


def too_few(name: str, batch_size: int, there: int) -> str:
    """What is wrong with data that does not fill one batch."""
    return f"a calibration batch needs {batch_size} training images, {name} has {there}"


def _batch(pairs: Sequence[tuple[Mapping[str, Any], Image]], rng: np.random.Generator, with_regions: bool) -> Batch:
    """A batch with a caption and, if asked for, a region of each pair, drawn by rng."""
    texts = [str(rng.choice(pair["captions"])) for pair, _ in pairs]
    regions = []
    if with_regions:
        for i, (pair, image) in enumerate(pairs):
            if pair["regions"]:
                region = pair["regions"][int(rng.integers(len(pair["regions"])))]
                scale = (*image.size, *image.size)
                box = [edge / side for edge, side in zip(region["box"], scale, strict=True)]
                regions.append((i, box, region["phrase"]))
    return Batch([image for _, image in pairs], texts, regions)


def _opened(image: Mapping[str, Any], broken: list[str] | None) -> Image | None:
    """The picture; None for one that cannot be read, if that is noted."""
    try:
        return open_image(image)
    except UnreadableImage as error:
        if broken is None:
            raise
        if str(error) not in broken:
            broken.append(str(error))
        return None
