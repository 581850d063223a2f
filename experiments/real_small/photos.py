"""Photos with their captions, the crops that training looks at, and captions without photos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Generator
from torchvision.transforms import functional as F

from vlprune.data import load_pairs

AREA, RATIO = (0.4, 1.0), (0.75, 4 / 3)  # of a crop, as a share of the photo and as width : height
WORDS = 14  # a batch costs as much as its longest caption
COLOUR = 0.3  # brightness, contrast and saturation change by up to that factor


@dataclass(frozen=True)
class Photos:
    """The photos of a split in memory: images (RGB), their ids and the captions of each."""

    images: list[Image.Image]
    ids: list[int | str]
    captions: list[list[str]]

    @property
    def texts(self) -> list[str]:
        """All captions, photo after photo."""
        return [caption for own in self.captions for caption in own]

    @property
    def owners(self) -> list[int]:
        """The number of the photo of each of the texts."""
        return [number for number, own in enumerate(self.captions) for _ in own]


def read_photos(data: str, split: str) -> Photos:
    """The photos of a split."""
    rows = list(load_pairs(data, split))
    return Photos([row["image"] for row in rows], [row["image_id"] for row in rows], [row["captions"] for row in rows])


def read_captions(path: Path) -> list[list[str]]:
    """The captions, of few words, of photos that are not there: a list of {captions: [{caption}]}, one list a photo."""
    rows = [[caption["caption"] for caption in row["captions"]] for row in json.loads(path.read_text("utf-8"))]
    short = [[caption for caption in row if len(caption.split()) <= WORDS] for row in rows]
    return [row for row in short if len(row) > 1]


def batches(size: int, batch: int, generator: Generator) -> list[list[int]]:
    """The numbers below `size` in a random order, in full batches."""
    order = torch.randperm(size, generator=generator).tolist()
    return [order[start : start + batch] for start in range(0, size - batch + 1, batch)]


def augment(image: Image.Image, size: int, generator: Generator) -> Image.Image:
    """A random crop of a photo as a square, flipped half of the time, in slightly other colours."""
    draws = torch.rand(9, generator=generator).tolist()
    area = image.width * image.height * (AREA[0] + draws[0] * (AREA[1] - AREA[0]))
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** draws[1]
    width = min(image.width, round((area * ratio) ** 0.5))
    height = min(image.height, round((area / ratio) ** 0.5))
    left, top = round(draws[2] * (image.width - width)), round(draws[3] * (image.height - height))
    crop = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if draws[4] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changes: Sequence = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for change, draw in zip(changes, draws[5:8]):
        crop = change(crop, 1 + COLOUR * (2 * draw - 1))
    return crop


def pick(captions: Sequence[Sequence[str]], generator: Generator) -> list[str]:
    """One caption of each photo."""
    return [own[int(torch.randint(len(own), (1,), generator=generator))] for own in captions]
