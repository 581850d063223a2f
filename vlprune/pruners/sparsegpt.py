"""Layer-wise optimal brain surgeon: for what a column loses, the columns to its right make up."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlprune.masks import Masks
from vlprune.pruners.layerwise import LAYERWISE, layer_counts
from vlprune.pruners.pruner import Alive, Pruner, Stats, Weights
from vlprune.selection import select_lowest, shares

DAMPING = 0.01  # added to the diagonal of the Hessian, as a fraction of its mean
BLOCK = 128  # columns whose entries compete


def sparsegpt_update(weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None) -> Masks:
    """Survivors and their new values, Frantar & Alistarh 2023 (arXiv:2301.00774), all layers equally sparse.

    Args:
        weights: {layer name: (out, in)}.
        stats: `input_outer` (in, in) of every layer, the sum of x xᵀ over its inputs x; only its direction counts.
        n_pruned: number of entries to prune in all layers together.
        alive: must be None, a ValueError otherwise: a layer's own count could need a dead entry.
    """
    if alive is not None:
        raise ValueError("method 'sparsegpt' cannot prune in steps: its entries do not compete within the model")
    counts = layer_counts(weights, n_pruned)
    solved = {name: _solve(name, weights[name], stats[name]["input_outer"], counts[name]) for name in weights}
    return Masks(
        {name: kept for name, (kept, _) in solved.items()}, {name: values for name, (_, values) in solved.items()}
    )


SPARSEGPT = Pruner(
    name="sparsegpt",
    source="Frantar & Alistarh 2023 (arXiv:2301.00774)",
    needs=frozenset({"input_outer"}),
    within="layer",
    update=sparsegpt_update,
    search=LAYERWISE,
)


def _solve(
    name: str, weight: Float[Tensor, "out in"], outer: Float[Tensor, "in in"], n_pruned: int
) -> tuple[Bool[Tensor, "out in"], Float[Tensor, "out in"]]:
    """Survivors (out, in) of one layer and their values, in float64 inside.

    The layer's count is shared by its blocks of columns in proportion to their sizes, by largest remainder. Inputs that
    were always zero are pruned first; where the count leaves some, they keep their values (the authors' code sets them
    to zero, which would prune more than asked) and do not enter the mean that scales the damping.
    """
    factor, dead = _inverse_factor(name, outer.double())
    left = weight.double()
    kept = torch.ones_like(weight, dtype=torch.bool)
    spans = [slice(start, start + BLOCK) for start in range(0, weight.shape[1], BLOCK)]
    sizes = [left[:, span].numel() for span in spans]
    for span, count in zip(spans, shares(sizes, n_pruned / weight.numel()).tolist()):
        values, own = left[:, span].clone(), factor[span, span]
        errors = torch.zeros_like(values)
        saliency = (values / own.diagonal()).square().masked_fill(dead[span], -1.0)
        kept[:, span] = select_lowest({name: saliency}, count)[name]
        for i in range(values.shape[1]):
            errors[:, i] = (values[:, i] / own[i, i]).masked_fill(kept[:, span][:, i], 0.0)
            values[:, i:] -= errors[:, i, None] * own[i, i:]
        left[:, span] = values
        left[:, span.stop :] -= errors @ factor[span, span.stop :]
    return kept, left.masked_fill(~kept, 0.0).to(weight.dtype)


def _inverse_factor(name: str, outer: Float[Tensor, "in in"]) -> tuple[Float[Tensor, "in in"], Bool[Tensor, " in"]]:
    """The upper Cholesky factor of the inverse of the damped Hessian, and which inputs were always zero."""
    if not outer.isfinite().all():
        raise ValueError(f"layer '{name}': 'input_outer' must be finite, got NaN or infinity")
    diagonal = outer.diagonal()
    dead = diagonal == 0
    damping = DAMPING * diagonal[~dead].mean()  # NaN, and used nowhere, where all are dead
    hessian = outer + torch.diag(torch.where(dead, torch.ones_like(diagonal), damping))
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info:
        raise ValueError(f"layer '{name}': 'input_outer' must be a sum of outer products, got a negative eigenvalue")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), dead
