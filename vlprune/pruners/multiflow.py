"""Multimodal flow pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from vlprune.pruners.pruner import LayerStats, Pruner, Stats, Weights
from vlprune.selection import modality_counts


def multiflow_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:
    """Information flow through an edge, Farina et al. 2024 (arXiv:2404.05621).

    |w_ij| times the importances of the two nodes it joins; the importance of a node is the mean over its edges of
    |w_ij| times the root of the squared norm of the input.

    Args:
        weight: (out, in).
        stats: `input_sq` (in,), sums of squared inputs; a common positive factor changes no mask.

    Returns:
        (out, in), not negative.
    """
    magnitude = weight.abs()
    flow = magnitude * stats["input_sq"].sqrt()
    return flow.mean(dim=1).outer(flow.mean(dim=0)) * magnitude


def modality_prior(
    weights: Weights,
    stats: Stats,  # noqa: ARG001
    modality: Mapping[str, str],
    sparsities: Sequence[float],
) -> list[dict[str, int]]:
    """How many entries each layer loses when magnitudes compete within their modality; an allocation for each sparsity.

    Deviation: counts are exact; the reference goes through a fraction of each layer and truncates, so that it may prune
    one entry of a layer less.
    """
    return modality_counts({name: weight.abs() for name, weight in weights.items()}, sparsities, modality)


MULTIFLOW = Pruner(
    name="multiflow",
    source="Farina et al. 2024 (arXiv:2404.05621)",
    needs=frozenset({"input_sq"}),
    score=multiflow_score,
    within="layer",
    allocate=modality_prior,
)
