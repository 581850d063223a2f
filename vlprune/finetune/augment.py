"""Random changes of training images: those that X-VLM, BLIP and the reference fine-tune with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

Example = Mapping[str, Any]

# Raised when the augmented images change, so that runs are made again.
VERSION = 1

LEVEL = 0.7  # 7 of 10
ENHANCE = 1.8 * LEVEL + 0.1  # factor of brightness and sharpness
SHEAR = math.degrees(math.atan(0.3 * LEVEL))
ROTATE = 30 * LEVEL  # degrees
TRANSLATE = round(10 * LEVEL)  # pixels
GREY: list[float] = [128, 128, 128]
SIDES = ("left", "right")


class PaperAugmentation:
    """RandomResizedCrop, flip and RandomAugment(2, 7) of ALBEF (arXiv:2107.07651), as X-VLM and BLIP have them.

    RandomAugment: twice, with probability 1/2, one of ten operations at level 7 of 10 and with a random sign. The image
    of a question is not flipped if it or one of its answers speaks of left or right. The random choices depend on the
    seed and the running number of the example alone, and the random state of the process is as before. Deviations:
    torchvision's operations on Pillow images for OpenCV's, which differ in rounding; a question's image is flipped
    after the crop and not before it.

    Args:
        size: side of the augmented images, in pixels.
        seed: seeds all random choices.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)

    def __call__(self, example: Example, number: int) -> dict[str, Any]:
        """The example with an augmented image; the same for the same running number."""
        drawn = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(drawn)  # that of the CPU; torch.manual_seed would reach the GPUs
            image: Image.Image = self.crop(example["image"])
            if not speaks_of_sides(example):
                image = FLIP(image)
            return {**example, "image": RANDOM_AUGMENT(image)}


def speaks_of_sides(example: Example) -> bool:
    """Whether a question or one of its answers has the word left or right in it; False for what is no question."""
    texts = [example["question"], *example["answers"]] if "question" in example else []
    return any(side in text.lower() for text in texts for side in SIDES)


def _moved(image: Any, angle: float, translate: list[float], shear: list[float]) -> Any:
    return F.affine(
        image,
        angle=angle,
        translate=translate,
        scale=1.0,
        shear=shear,
        interpolation=InterpolationMode.BILINEAR,
        fill=GREY,
        # OpenCV's shears keep the upper left corner where it is, rotations the middle.
        center=[0.0, 0.0] if any(shear) else None,
    )


def _either_way(angle: float = 0.0, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)):
    return v2.RandomChoice(
        [
            v2.Lambda(
                partial(
                    _moved,
                    angle=sign * angle,
                    translate=[sign * t for t in translate],
                    shear=[sign * s for s in shear],
                )
            )
            for sign in (1, -1)
        ]
    )


OPERATIONS = {
    "identity": v2.Identity(),
    "autocontrast": v2.RandomAutocontrast(1.0),
    "equalize": v2.RandomEqualize(1.0),
    "brightness": v2.ColorJitter(brightness=(ENHANCE, ENHANCE)),
    "sharpness": v2.RandomAdjustSharpness(ENHANCE, 1.0),
    "shear x": _either_way(shear=(SHEAR, 0.0)),
    "shear y": _either_way(shear=(0.0, SHEAR)),
    "translate x": _either_way(translate=(TRANSLATE, 0)),
    "translate y": _either_way(translate=(0, TRANSLATE)),
    "rotate": _either_way(angle=ROTATE),
}
FLIP = v2.RandomHorizontalFlip()
RANDOM_AUGMENT = v2.Compose([v2.RandomApply([v2.RandomChoice(list(OPERATIONS.values()))], 0.5)] * 2)
