"""`landscapes`: places under a sky at a time of day, which no embedded model has seen.

Another look and language than `scenes`: textured ground, a sky that changes with the hour, things of several parts that
stand near or far away, words and questions of people who describe a view. What is downstream of a pruning that does not
know it is tested on this set; the embedded models are pretrained, and should be calibrated, on other data.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from vlprune.data.drawn import DrawnSet, Picture, distinct
from vlprune.data.landscapes.look import box_of, pixels
from vlprune.data.landscapes.view import VERSION, landscape
from vlprune.data.landscapes.words import captions, questions

__all__ = ["LANDSCAPES"]

SPLITS = {"test": 300, "val": 300, "train": 4000}
STARTS = {"test": 0, "val": 500_000, "train": 1_000_000}


def _pictures(split: str) -> Iterator[Picture]:
    """The pictures of a split; no landscape is in two splits.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of landscapes; there are: {', '.join(SPLITS)}")
    seen: frozenset[Hashable] = frozenset()
    for name, count in SPLITS.items():
        seeds, seen = distinct(lambda seed: landscape(seed).signature, STARTS[name], count, seen)
        if name == split:
            break
    for view in map(landscape, seeds):
        regions = [(box_of(thing), thing.a) for thing in (*view.ground, *view.sky)]
        yield Picture(pixels(view), captions(view), questions(view), regions)


LANDSCAPES = DrawnSet("landscapes", VERSION, tuple(reversed(SPLITS)), _pictures)
