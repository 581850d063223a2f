"""Weights and activations, with equal or with learned layer sparsities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vlprune.pruners.layerwise import blocks
from vlprune.pruners.pruner import LayerStats, Pruner, Stats, Weights
from vlprune.selection import shares

HEADROOM = 0.1  # how far a block's sparsity may lie above that of the model


def wanda_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:
    """Absolute weight times the norm of its input, Sun et al. 2023 (arXiv:2306.11695).

    Deviation from the reference: all layers see the inputs of the dense model, there those of the layers pruned so far.

    Args:
        weight: (out, in).
        stats: `input_sq` (in,), sums of squared inputs; a common positive factor changes no mask.

    Returns:
        (out, in), not negative.
    """
    return weight.abs() * stats["input_sq"].sqrt()


def zeroth_order_counts(
    weights: Weights,
    stats: Stats,
    modality: Mapping[str, str],  # noqa: ARG001
    sparsities: Sequence[float],
) -> list[dict[str, int]]:
    """How many entries each layer loses, by its block, Sung et al. 2024 (arXiv:2310.02998).

    Of the n entries of a block, n (1 - s - HEADROOM) are kept in any case, at least none. The rest of all that are kept
    goes to the blocks in proportion to the sum of `zo_grad` over their layers, a full block's surplus to the others, as
    in the authors' code (ylsung/ECoFLaP). The layers of a block are equally sparse. Deviation: counts are exact, by
    largest remainder, where that code rounds up and then corrects the total.

    Args:
        weights: {layer name: (out, in)}.
        stats: `zo_grad` () of every layer, not negative; only their ratios count, and where all are zero, the sizes.
        modality: does not count: vision and language share one budget, as in the authors' code.
        sparsities: pruned fractions.
    """
    groups = list(blocks(weights).values())
    sizes = [np.array([weights[name].numel() for name in group]) for group in groups]
    importance = []
    for group in groups:
        importance.append(sum(float(stats[name]["zo_grad"]) for name in group))
        if not math.isfinite(importance[-1]) or importance[-1] < 0:
            raise ValueError(f"layer '{group[0]}': 'zo_grad' of its block must be finite and at least 0")
    totals = np.array([size.sum() for size in sizes], dtype=np.float64)
    allocations = []
    for sparsity in sparsities:
        n_kept = totals.sum() - round(sparsity * totals.sum())
        sure = totals * min(max(0.0, 1 - sparsity - HEADROOM), n_kept / totals.sum())
        kept = np.minimum(sure + _fill(n_kept - sure.sum(), np.array(importance), totals - sure), totals)
        counts: dict[str, int] = {}
        for group, size, n_pruned in zip(groups, sizes, _rounded(totals - kept)):
            counts.update(zip(group, shares(size.tolist(), n_pruned / size.sum()).tolist()))
        allocations.append({name: counts[name] for name in weights})
    return allocations


WANDA = Pruner(
    name="wanda",
    source="Sun et al. 2023 (arXiv:2306.11695)",
    needs=frozenset({"input_sq"}),
    score=wanda_score,
    within="row",
)
ECOFLAP = Pruner(
    name="ecoflap",
    source="zeroth-order layer sparsities with Wanda, Sung et al. 2024 (arXiv:2310.02998)",
    needs=frozenset({"input_sq", "zo_grad"}),
    score=wanda_score,
    within="row",
    allocate=zeroth_order_counts,
)


def _fill(
    amount: float, importance: Float[np.ndarray, " blocks"], room: Float[np.ndarray, " blocks"]
) -> Float[np.ndarray, " blocks"]:
    """An amount split in proportion to importance; what a block has no room for goes to the others."""
    given = np.zeros_like(room)
    for _ in room:  # a pass that leaves something fills at least one block
        is_open = given < room
        pull = np.where(is_open, importance, 0.0)
        if not pull.any():
            pull = np.where(is_open, room, 0.0)
        if not pull.any():
            break
        given = np.minimum(given + (amount - given.sum()) * pull / pull.sum(), room)
    return given


def _rounded(values: Float[np.ndarray, " blocks"]) -> Int[np.ndarray, " blocks"]:
    """Whole numbers with the rounded sum of the values, by largest remainder."""
    whole = np.floor(values).astype(np.int64)
    missing = round(values.sum()) - int(whole.sum())
    whole[np.argsort(whole - values, kind="stable")[:missing]] += 1
    return whole
