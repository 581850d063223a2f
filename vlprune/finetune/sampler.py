"""Which training examples each forward pass sees, epoch after epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator
from torch.utils.data import DataLoader, RandomSampler, Sampler

if TYPE_CHECKING:
    from datasets import Dataset

Example = Mapping[str, Any]
Augment = Callable[[Example, int], Example]


def not_augmented(example: Example, _number: int) -> Example:
    """The example as it is: the `Augment` of training without augmentation."""
    return example


class CaptionExamples(Sequence):
    """Training examples of one caption each: an image with five captions is five examples.

    Args:
        pairs: images with their captions, as `load_pairs` returns them.
    """

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


class AugmentedExamples(Sequence):
    """The examples of all epochs under running numbers, augmented by their number.

    Of n examples, those of the first epoch have the numbers 0 to n - 1, those of the second n to 2n - 1, and so on.

    Args:
        examples: those of one epoch.
        augment: (example, number) -> the example that is trained on; the same for the same number, in any process.
    """

    def __init__(self, examples: Sequence[Example], augment: Augment) -> None:
        self.examples, self.augment = examples, augment

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        return self.augment(self.examples[number % len(self.examples)], number)


class PassSampler(Sampler[list[int]]):
    """A batch sampler of forward passes: the numbers of the examples of one pass after another; iterate per epoch.

    An optimizer step has batch_size examples, or all where there are fewer. They are split as evenly as possible into
    passes, none of them larger than device_batch. Of 100 examples, with batch_size 10 and device_batch 4, the passes of
    a step have 4, 3 and 3 examples. A pass is split as evenly as possible over the processes, so that what is in a pass
    does not depend on how many there are.

    Args:
        n: number of examples in an epoch.
        batch_size: examples in an optimizer step, over all processes.
        device_batch: most examples in a pass, over all processes (None: all of the step).
        steps: number of optimizer steps in an epoch; where they need more than n examples, the first ones of the epoch
            fill up the last step.
        generator: draws the order of the examples, anew in each epoch.
        rank: number of this process.
        world: number of processes.

    Attributes:
        size: examples in an optimizer step, over all processes.
        per_step: passes in an optimizer step.
        epoch: number of the next epoch.
        skip: number of passes to leave out at the beginning of the next epoch.

    Raises:
        ValueError: a pass has fewer examples than there are processes.
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
        self.per_step = -(-self.size // (device_batch or self.size))
        if (least := self.size // self.per_step) < world:
            raise ValueError(
                f"a forward pass of {least} examples cannot be shared by {world} processes; start fewer, or raise "
                "finetuning.batch_size or device_batch"
            )
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that an epoch begins with its first pass: loaders with workers ask for two iterators.
        skip, self.skip = self.skip, 0
        first = self.epoch * self.n
        self.epoch += 1
        yield from islice(self._passes(first), skip, None)

    def _passes(self, first: int) -> Iterator[list[int]]:
        order = np.fromiter(RandomSampler(range(self.n), generator=self.generator), int)
        for step in range(self.steps):
            rows = order[np.arange(step * self.size, (step + 1) * self.size) % self.n]
            for numbers in np.array_split(first + rows, self.per_step):
                yield np.array_split(numbers, self.world)[self.rank].tolist()


class Epochs(Iterator[list[Any]]):
    """The examples of one pass after another, without end, which can go on from where another such iterator was.

    Args:
        loader: gives the passes of one epoch.
        sampler: its batch sampler.
    """

    def __init__(self, loader: DataLoader, sampler: PassSampler) -> None:
        self.loader, self.sampler = loader, sampler
        self.epoch, self.taken, self.order = sampler.epoch, 0, sampler.generator.get_state()
        self._passes = iter(())

    def __next__(self) -> list[Any]:
        batch = next(self._passes, None)
        while batch is None:
            # What the epoch's order is drawn from, before it is drawn.
            self.epoch, self.taken = self.sampler.epoch, self.sampler.skip
            self.order = self.sampler.generator.get_state()
            # The seed that a loader draws for its workers if it has this generator; orders are those that follow it.
            torch.empty((), dtype=torch.int64).random_(generator=self.sampler.generator)
            self._passes = iter(self.loader)
            batch = next(self._passes, None)
        self.taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the sequence of passes, for `load_state_dict`."""
        return {"epoch": self.epoch, "taken": self.taken, "order": self.order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; before the first pass is taken."""
        self.sampler.epoch, self.sampler.skip = state["epoch"], state["taken"]
        self.sampler.generator.set_state(state["order"])
