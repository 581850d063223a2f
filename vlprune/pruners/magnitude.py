"""Scores from the weights alone, and random scores."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlprune.pruners.pruner import LayerStats, Pruner


def random_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:
    """Uniform noise, a function of the seed alone: what any method has to beat.

    Args:
        weight: (out, in); only its shape, dtype and device count.
        stats: `seed` (), int64, a seed for this layer that `prune_masks` gives; 0 without it.

    Returns:
        (out, in), in [0, 1).
    """
    generator = torch.Generator().manual_seed(int(stats.get("seed", 0)))
    return torch.rand(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)


def magnitude_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:  # noqa: ARG001
    """Absolute value, Han et al. 2015 (arXiv:1506.02626).

    Args:
        weight: (out, in).
        stats: none needed.

    Returns:
        (out, in), not negative.
    """
    return weight.abs()


def l2_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:  # noqa: ARG001
    """Absolute value over the Frobenius norm of the layer, so that layers of different scale can be compared.

    A baseline of Farina et al. 2024 (arXiv:2404.05621).

    Args:
        weight: (out, in).
        stats: none needed.

    Returns:
        (out, in), in [0, 1]; a layer of zeros scores 0.
    """
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64)  # float32 sums would depend on the number of threads
    return weight.abs() / norm.to(weight.dtype).clamp_min(torch.finfo(weight.dtype).tiny)


def lamp_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:  # noqa: ARG001
    """Layer-adaptive magnitude, Lee et al. 2021 (arXiv:2010.07611).

    The square of an entry over the sum of the squares of all entries of its layer that come not earlier in the
    ascending order (equal ones in the order of their index), so that the scores of different layers can be compared.
    The sums run in float64 from the largest entry down, where the reference subtracts float32 prefix sums from the
    total and cancels.

    Args:
        weight: (out, in).
        stats: none needed.

    Returns:
        (out, in), in [0, 1]; the largest entry of every layer scores 1, zeros score 0.
    """
    magnitude, order = _descending(weight.flatten().abs())
    squares = magnitude.double().square_()
    not_smaller = squares.cumsum(0).clamp_min_(torch.finfo(torch.float64).tiny)
    scores = squares.div_(not_smaller).to(weight.dtype)
    return torch.empty_like(scores).scatter_(0, order, scores).view_as(weight)


RANDOM = Pruner(name="random", source="uniform random scores", score=random_score, draws=True)
OMP = Pruner(name="omp", source="one-shot global magnitude, Han et al. 2015 (arXiv:1506.02626)", score=magnitude_score)
LOCALMP = Pruner(
    name="localmp",
    source="layer-wise magnitude, Han et al. 2015 (arXiv:1506.02626)",
    score=magnitude_score,
    within="layer",
)
L2 = Pruner(name="l2", source="magnitude over the layer's norm, Farina et al. 2024 (arXiv:2404.05621)", score=l2_score)
LAMP = Pruner(name="lamp", source="Lee et al. 2021 (arXiv:2010.07611)", score=lamp_score)


def _descending(magnitude: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Values that are not negative, the largest first, and their indices, of equal ones the highest first."""
    if magnitude.dtype != torch.float32 or magnitude.device.type != "cpu":
        ascending = magnitude.sort(stable=True)
        return ascending.values.flip(0), ascending.indices.flip(0)
    # The bits of such floats have the same order as integers. With the index behind them no two are equal, so that any
    # sort will do: NumPy's of integers takes a fraction of the time of torch's stable sort of floats.
    keys = magnitude.view(torch.int32).long().bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(len(keys))).bitwise_not_().numpy().sort()
    keys.bitwise_not_()
    order = keys & 0xFFFFFFFF
    return keys.bitwise_right_shift_(32).int().view(torch.float32), order
