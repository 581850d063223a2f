"""Batch: image-text pairs of pretraining and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image


@dataclass(frozen=True)
class Batch:
    """Image-text pairs, and boxes with their phrases where the data has them.

    Attributes:
        images: n RGB images.
        texts: n captions.
        regions: (position of the image, box [x, y, width, height] as fractions of its size, phrase), possibly none.
    """

    images: Sequence[Image]
    texts: Sequence[str]
    regions: Sequence[tuple[int, Sequence[float], str]] = ()
