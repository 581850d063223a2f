"""Ranks: the processes that train or evaluate one model together, each on a share of the examples.

They are those of torch's process group; where there is none, there is one rank, for which every function here returns
what it is given. Those that exchange something are called by all ranks, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if world() > 1 else 0


def told(value: T) -> T:
    """The value that rank 0 has."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def listed(values: Iterable[T]) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    if world() == 1:
        return list(values)
    found: list[Sequence[T]] = [()] * world()
    dist.all_gather_object(found, list(values))
    return [value for own in found for value in own]


def in_turns(makes: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each of these functions returns, in order; each is called by one rank, and all ranks get what it returns."""
    for first in range(0, len(makes), world()):
        yield from listed(make() for make in makes[first : first + world()][rank() : rank() + 1])


def share(n: int) -> tuple[slice, int]:
    """Where the n examples of this rank are among those of all ranks, and how many all are."""
    counts = listed([n])
    first = sum(counts[: rank()])
    return slice(first, first + n), sum(counts)


def gathered(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks, in the order of the ranks; a loss of all rows reaches those of every rank.

    Ranks may have different numbers of rows. The gradient of a rank's rows is the sum of those that all ranks have for
    them: with parameters whose gradients are averaged over the ranks, a loss that every rank computes from all rows
    has the gradient that it has in one process.
    """
    if world() == 1:
        return rows
    counts = listed([len(rows)])
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows)))
    everything: Tensor = _Gathered.apply(padded)  # pyright: ignore[reportAssignmentType]
    return torch.cat([own[:count] for own, count in zip(everything, counts)])


class _Gathered(torch.autograd.Function):
    """Tensors (...) of all ranks as one (ranks, ...); torch's own function that has a gradient is not public."""

    @staticmethod
    def forward(_ctx: Any, own: Tensor) -> Tensor:
        """Sends the tensor of this rank to all others."""
        found = [torch.empty_like(own) for _ in range(world())]
        dist.all_gather(found, own.contiguous())
        return torch.stack(found)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        """Adds up what all ranks have for the tensor of this one."""
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[rank()]


def mean_of_all(mean: Tensor, count: int, n: int) -> Tensor:
    """What the mean of something over all ranks is to this rank: a value whose mean over all examples is that mean.

    Ranks are averaged by their numbers of examples. A mean over something else, such as the tokens of captions, would
    come out wrong where one rank has more of it for an example than another.

    Args:
        mean: of what this rank has, a scalar.
        count: how many there are of it in this rank, such as tokens.
        n: number of examples of this rank.
    """
    if world() == 1:
        return mean
    counts, examples = zip(*listed([(count, n)]))
    return mean * (count * sum(examples) / (sum(counts) * n))
