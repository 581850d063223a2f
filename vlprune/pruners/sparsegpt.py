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

    Of a Hessian H = R R', R upper triangular, the factor that the paper takes of the inverse is the inverse of R. Only
    its diagonal blocks are computed here: the columns C of a block make up for what is lost before it by
    D R[before, C] inv(R[C, C]), where D (out, before) is how far the weights before it were lowered.
    """
    dead = outer.diagonal() == 0
    factor = _factor(name, outer, dead)
    dense = weight.T.double().contiguous()  # so that a column of the weight lies together
    lowered, values = torch.empty_like(dense), torch.empty_like(dense)
    kept = torch.ones_like(weight, dtype=torch.bool)
    spans = [slice(start, min(start + BLOCK, len(dense))) for start in range(0, len(dense), BLOCK)]
    sizes = [dense[span].numel() for span in spans]
    for span, count in zip(spans, shares(sizes, n_pruned / weight.numel()).tolist()):
        before, square = slice(span.start), factor[span, span]
        inverse = torch.linalg.solve_triangular(square, torch.eye(len(square)).to(square), upper=True).T.contiguous()
        own = values[span]
        torch.addmm(dense[span], inverse, factor[before, span].T @ lowered[before], out=own)
        saliency = (own / inverse.diagonal()[:, None]).square_().masked_fill_(dead[span, None], -1.0)
        kept[:, span] = select_lowest({name: saliency.T.contiguous()}, count)[name]
        _compensate(own, inverse, ~kept[:, span].T)
        torch.sub(dense[span], own, out=lowered[span])
    return kept, values.T.to(weight.dtype, memory_format=torch.contiguous_format)


def _compensate(
    values: Float[Tensor, "in out"], inverse: Float[Tensor, "in in"], pruned: Bool[Tensor, "in out"]
) -> None:
    """Changes the values of a block in place: pruned ones to zero, later ones of their row to make up for them."""
    errors = torch.empty_like(values)
    scales = pruned / inverse.diagonal()[:, None]
    for i, value in enumerate(values):
        value.addmv_(errors[:i].T, inverse[i, :i], alpha=-1.0)
        torch.mul(value, scales[i], out=errors[i])
    values.masked_fill_(pruned, 0.0)


def _factor(name: str, outer: Float[Tensor, "in in"], dead: Bool[Tensor, " in"]) -> Float[Tensor, "in in"]:
    """The upper triangular R, float64, of the damped Hessian R R'."""
    if not outer.isfinite().all():
        raise ValueError(f"layer '{name}': 'input_outer' must be finite, got NaN or infinity")
    hessian = outer.double().flip(0, 1)  # from the last input to the first, where a lower triangle is an upper one
    diagonal = outer.diagonal().double()
    damping = DAMPING * diagonal[~dead].mean()  # NaN, and used nowhere, where all are dead
    hessian.diagonal().add_(torch.where(dead, 1.0, damping).flip(0))
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info:
        raise ValueError(f"layer '{name}': 'input_outer' must be a sum of outer products, got a negative eigenvalue")
    return lower.flip(0, 1)
