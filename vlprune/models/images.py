"""Pictures as the pixels that a vision encoder takes, and its position embeddings at another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("squash", "crop")


@dataclass(frozen=True)
class ImageInput:
    """How a picture becomes the square of pixels that a vision encoder takes.

    Attributes:
        size: side of the square, in pixels.
        mean: the mean of each of the three channels, in [0, 1], that is subtracted.
        std: the standard deviation of each of the three channels, by which the difference is divided.
        fit: "squash" the picture to the square, or "crop" the middle of it after scaling its shorter side.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fit: str = "squash"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")

    def pixels(self, images: Sequence[Image.Image], device: torch.device) -> Tensor:
        """Normalised pixels (n, 3, size, size), resized bicubically."""
        stacked = torch.from_numpy(np.stack([np.asarray(self._square(image)) for image in images]))
        stacked = stacked.to(device).float().div_(255)
        mean, std = (torch.tensor(v, device=device) for v in (self.mean, self.std))
        return ((stacked - mean) / std).permute(0, 3, 1, 2).contiguous()

    def _square(self, image: Image.Image) -> Image.Image:
        rgb, size = image.convert("RGB"), (self.size, self.size)
        if self.fit == "crop":
            short = min(rgb.size)
            width, height = (self.size if side == short else int(self.size * side / short) for side in rgb.size)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            whole = rgb.resize((width, height), Image.Resampling.BICUBIC)
            rgb = whole.crop((left, top, left + self.size, top + self.size))
        return rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BICUBIC)


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1 + side², width) of a class token and a grid of patches, from (1 + old², width).

    Bicubic, corners not aligned, as in ALBEF, BLIP and X-VLM.

    Raises:
        ValueError: the number of patches is no square.
    """
    grid = positions[1:]
    old = round(len(grid) ** 0.5)
    if old * old != len(grid):
        raise ValueError(f"position embeddings must be of a class token and a square of patches, got {len(positions)}")
    if old == side:
        return positions
    channels = grid.T.reshape(1, -1, old, old)
    resized = F.interpolate(channels.float(), size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], resized.flatten(2)[0].T.to(positions.dtype)])


def square(size: object) -> int:
    """The side of square images, from the `image_size` of a config of transformers.

    Raises:
        ValueError: the size is not one whole number, so that the images are not square.
    """
    if not isinstance(size, int):
        raise ValueError(f"the model must take square images, got image_size {size!r}")
    return size
