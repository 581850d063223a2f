"""Draws: which training examples a step sees, epoch after epoch, and what is changed in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Generator
from torch.utils.data import RandomSampler, Sampler

if TYPE_CHECKING:
    from datasets import Dataset

Example = Mapping[str, Any]
Change = Callable[[Example, int], Example]


def unchanged(example: Example, _number: int) -> Example:
    """The example: the `Change` of training without augmentation."""
    return example


class Captions(Sequence):
    """Pairs of an image and one of its captions: an image with five captions is five examples."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs
        self.ends = list(accumulate(len(captions) for captions in pairs.select_columns("captions")["captions"]))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = bisect_right(self.ends, index)
        pair = self.pairs[row]
        caption = pair["captions"][index - self.ends[row]]
        return {**pair, "captions": [caption]}


class Drawn(Sequence):
    """The examples by the number of their draw: those of an epoch are numbered on from those of the one before.

    Attributes:
        examples: of one epoch.
        change: (example, number) -> what is trained on; the same for the same number, in whatever process.
    """

    def __init__(self, examples: Sequence[Example], change: Change) -> None:
        self.examples, self.change = examples, change

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        return self.change(self.examples[number % len(self.examples)], number)


class Passes(Sampler[list[int]]):
    """The draws of one forward pass after another; a new iterator is the next epoch.

    A step's batch has batch_size examples, or all where there are fewer. It is split as evenly as may be into passes,
    as many in every process, none of them larger than device_batch.

    Args:
        n: examples of an epoch.
        batch_size: examples a step, over all processes.
        device_batch: most examples a pass; None: all.
        steps: of an epoch; the first examples of the epoch fill up its last batch.
        generator: of the order.
        rank: number of this process.
        world: number of processes.

    Attributes:
        size: examples a step, over all processes.
        per_step: passes a step, in this process.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        device_batch: int | None,
        steps: int,
        generator: Generator,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n, self.steps, self.generator, self.rank, self.world = n, steps, generator, rank, world
        self.size = min(batch_size, n)
        self.per_step = -(-self.size // (world * (device_batch or self.size)))
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self.n
        self.epoch += 1
        order = np.fromiter(RandomSampler(range(self.n), generator=self.generator), int)
        for step in range(self.steps):
            rows = order[np.arange(step * self.size, (step + 1) * self.size) % self.n]
            passes = np.array_split(first + rows, self.world * self.per_step)
            for numbers in passes[self.rank * self.per_step : (self.rank + 1) * self.per_step]:
                yield numbers.tolist()
