"""CHITA and CHITA++: an L0-constrained quadratic model of the loss, solved by a line search and block-wise regression.

Benbaki et al. 2023 (arXiv:2302.14623), with the first-order term and the blocks that Farina et al. 2024
(arXiv:2404.05621) use for vision-language models. The problem, for weights w (p,), gradient rows A (n, p), a
first-order term alpha (p,), damping d > 0 and k entries to keep, is

    minimize over b, at most k non-zeros:   0.5 |A (w - b)|^2 + d |w - b|^2 + alpha . b

Rows are only read in blocks of columns, of which sums are needed, so that they never have to be in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlprune.masks import Masks
from vlprune.pruners.pruner import Alive, Pruner, Stats, Weights
from vlprune.selection import select_lowest

LAM = 1e-2  # ridge per row, to be calibrated; at the reference's 1e-5 weights of its tiny model move by up to 4.4
BLOCK = 10_000  # columns solved together

_HALVINGS = 100
_DOUBLINGS = 10
_SLACK = 1e-10
_NO_ALPHA = 1e-8


def solve(
    w: Float[Tensor, " p"],
    rows: Float[Tensor, "n p"],
    n_keep: int,
    alpha: Float[Tensor, " p"],
    damping: float,
    blocks: Sequence[int],
) -> Float[Tensor, " p"]:
    """The pruned weights: `n_keep` survivors with new values, zeros elsewhere.

    Args:
        w: (p,) weights, float32 or float64.
        rows: (n, p) gradient rows.
        n_keep: entries to keep.
        alpha: (p,) first-order term, may be zero.
        damping: factor of |w - b|^2, positive.
        blocks: boundaries of the column blocks, rising from 0 to p; blocks of length zero are skipped.

    Returns:
        (p,) in the dtype of w. A survivor may get the value 0.0 exactly; `solve_support` tells it from a pruned one.
    """
    return solve_support(w, rows, n_keep, alpha, damping, blocks)[0]


def solve_support(
    w: Float[Tensor, " p"],
    rows: Float[Tensor, "n p"],
    n_keep: int,
    alpha: Float[Tensor, " p"],
    damping: float,
    blocks: Sequence[int],
) -> tuple[Float[Tensor, " p"], Bool[Tensor, " p"]]:
    """The pruned weights (p,) and which are survivors (p,) bool, exactly `n_keep`; arguments of `solve`.

    Deviations from the reference: a line search without any improving step keeps the weights restricted to their
    support (there the whole block is lost); exactly n_keep entries survive, ties broken as in `selection` (there ties
    with the threshold are all lost); a block may be kept whole (there an error); small systems are solved in float64
    throughout (there the products are float32, unstable for a small damping).
    """
    if blocks[0] != 0 or blocks[-1] != len(w) or any(a > b for a, b in pairwise(blocks)):
        raise ValueError(f"blocks must rise from 0 to {len(w)}, got {list(blocks)}")
    columns = _Columns(w, rows, alpha, torch.ones_like(w, dtype=torch.bool), blocks)
    return _solve([columns], n_keep, damping)[0]


def block_boundaries(size: int, block: int = BLOCK) -> list[int]:
    """Boundaries of nearly equal blocks of at least `block` of `size` columns (one block when there are fewer)."""
    if size < block:
        return [0, size]
    n_blocks = size // block
    step = size // n_blocks
    return [*range(0, n_blocks * step, step), size]


def chita_update(weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None, lam: float) -> Masks:
    """Survivors of all layers and their new values.

    The first-order term is the sum of the rows over the samples B behind a row: a mean gradient of B samples stands for
    1/B of the Fisher information of a sample, so that this is the expansion of one loss. The reference takes B from its
    first batch; here it is the mean over the batches.

    Args:
        weights: {layer name: (out, in)}.
        stats: `grad_rows` (n, out * in) of every layer, mean-batch gradients, as many rows in each, and `row_size` ().
        n_pruned: entries to prune, in all layers together.
        alive: entries that may be kept; None for all.
        lam: ridge per row, damping = n * lam / 2.

    Returns:
        Masks with `weights`.
    """
    n_rows = {name: len(stats[name]["grad_rows"]) for name in weights}
    if len(set(n_rows.values())) > 1:
        raise ValueError(f"every layer needs as many rows in 'grad_rows', got {n_rows}")
    parts = []
    for name, weight in weights.items():
        rows = stats[name]["grad_rows"]
        alpha = (rows.sum(dim=0) / stats[name]["row_size"]).to(weight.dtype)
        if not alpha.isfinite().all():
            raise ValueError(f"layer '{name}': gradient rows must be finite, got NaN or infinity")
        mask = torch.ones_like(weight, dtype=torch.bool) if alive is None else alive[name]
        parts.append(_Columns(weight.flatten(), rows, alpha, mask.flatten(), block_boundaries(weight.numel())))
    n_keep = sum(weight.numel() for weight in weights.values()) - n_pruned
    solved = _solve(parts, n_keep, damping=max(n_rows.values()) * lam / 2)
    return Masks(
        {name: support.view_as(weights[name]) for name, (_, support) in zip(weights, solved)},
        {name: values.view_as(weights[name]) for name, (values, _) in zip(weights, solved)},
    )


CHITA = Pruner(
    name="chita",
    source="Benbaki et al. 2023 (arXiv:2302.14623)",
    needs=frozenset({"grad_rows", "row_size"}),
    update=partial(chita_update, lam=LAM),
)
CHITA_PP = Pruner(
    name="chita++",
    source="CHITA in steps, Benbaki et al. 2023 (arXiv:2302.14623)",
    needs=frozenset({"grad_rows", "row_size"}),
    update=partial(chita_update, lam=LAM),
    iterative=True,
)


@dataclass(frozen=True)
class _Columns:
    """The columns of one layer, or of one block: w, alpha, alive (p,), rows (n, p), boundaries of the blocks."""

    w: Tensor
    rows: Tensor
    alpha: Tensor
    alive: Tensor
    blocks: Sequence[int]

    def spans(self) -> Iterator[slice]:
        """The blocks that are not empty."""
        return (slice(a, b) for a, b in pairwise(self.blocks) if a < b)

    def block(self, span: slice) -> _Columns:
        """One block by itself, in float64."""
        w, rows, alpha = (tensor[..., span].double() for tensor in (self.w, self.rows, self.alpha))
        return _Columns(w, rows, alpha, self.alive[span], [0, len(w)])

    def product(self, x: Tensor) -> Tensor:
        """rows @ x, (n,) float64; blocks where x is zero are not read."""
        total = torch.zeros(len(self.rows), dtype=torch.float64, device=x.device)
        for span in self.spans():
            if x[span].any():
                total += self.rows[:, span].double() @ x[span].double()
        return total

    def gradient(self, beta: Tensor, residual: Tensor, damping: float) -> Tensor:
        """Gradient of the objective at beta (p,), zero at dead entries; residual (n,) is rows @ (w - beta)."""
        gradient = self.alpha + 2 * damping * (beta - self.w)
        if residual.any():  # not so before the first step, where beta is w: no pass over the rows
            for span in self.spans():
                gradient[span] -= (residual @ self.rows[:, span].double()).to(gradient.dtype)
        return gradient.masked_fill_(~self.alive, 0.0)


def _solve(parts: list[_Columns], n_keep: int, damping: float) -> list[tuple[Tensor, Tensor]]:
    """New values (p,) and support (p,) of every part; `n_keep` survivors in all of them together."""
    n_alive = sum(int(part.alive.sum()) for part in parts)
    if not 0 <= n_keep <= n_alive:
        raise ValueError(f"cannot keep {n_keep} of {n_alive} entries")
    if damping <= 0:
        raise ValueError(f"damping must be positive, got {damping}")
    betas, supports = _search(parts, [part.w for part in parts], n_keep, damping)
    solved = []
    for part, beta, support in zip(parts, betas, supports):
        values = torch.zeros_like(part.w)
        survivors = torch.zeros_like(support)
        for span in part.spans():
            # The global step says how many entries a block keeps; which ones, the block decides again.
            if n_block := int(support[span].sum()):
                block = part.block(span)
                _, [survivors[span]] = _search([block], [beta[span].double()], n_block, damping)
                values[span] = _regress(block, survivors[span], damping).to(values.dtype)
        solved.append((values, survivors))
    return solved


def _search(
    parts: list[_Columns], betas: list[Tensor], n_keep: int, damping: float
) -> tuple[list[Tensor], list[Tensor]]:
    """A projected gradient step from betas, its length found by a line search: new betas and their supports.

    Without a first-order term, the largest entries as they are.
    """
    supports = _largest(parts, betas, n_keep)
    restricted = [beta * support for beta, support in zip(betas, supports)]
    if _norm_sq([part.alpha for part in parts]) <= _NO_ALPHA**2 or n_keep == 0:
        return restricted, supports

    residual = _product(parts, [part.w - beta for part, beta in zip(parts, betas)])
    gradients = [part.gradient(beta, residual, damping) for part, beta in zip(parts, betas)]
    inside = [gradient * support for gradient, support in zip(gradients, supports)]
    slope = _norm_sq(inside)
    curvature = _norm_sq([_product(parts, inside)]) + 2 * damping * slope
    length = slope / curvature if slope > 0 else 0.0  # the exact minimum along the gradient within the support

    if _keeps_support(parts, betas, gradients, supports, length):
        return [beta - length * gradient for beta, gradient in zip(restricted, inside)], supports

    for _ in range(_HALVINGS):
        length /= 2
        if _keeps_support(parts, betas, gradients, supports, length):
            break
    best, best_supports, least = restricted, supports, _objective(parts, restricted, damping)
    for _ in range(_DOUBLINGS):
        stepped = [beta - length * gradient for beta, gradient in zip(betas, gradients)]
        trial_supports = _largest(parts, stepped, n_keep)
        trial = [beta * support for beta, support in zip(stepped, trial_supports)]
        objective = _objective(parts, trial, damping)
        if not objective < least:
            break
        best, best_supports, least = trial, trial_supports, objective
        length *= 2
    return best, best_supports


def _keeps_support(
    parts: list[_Columns], betas: list[Tensor], gradients: list[Tensor], supports: list[Tensor], length: float
) -> bool:
    """Whether the largest entry after a step of that length is still within the support (a weak test, as published)."""
    within, beyond = -torch.inf, -torch.inf
    for part, beta, gradient, support in zip(parts, betas, gradients, supports):
        stepped = (beta - length * gradient).abs_()
        within = max(within, float(stepped.masked_fill(~support, -torch.inf).max()))
        beyond = max(beyond, float(stepped.masked_fill_(support | ~part.alive, -torch.inf).max()))
    return within >= beyond - _SLACK


def _regress(block: _Columns, support: Tensor, damping: float) -> Tensor:
    """The exact minimum (p,) on a support (p,), through the smaller of the two equivalent linear systems."""
    rows = block.rows[:, support]
    n, size = rows.shape
    target = rows.T @ (block.rows @ block.w) + 2 * damping * block.w[support] - block.alpha[support]
    if n < size:  # Woodbury
        system = torch.eye(n, dtype=rows.dtype, device=rows.device) + rows @ rows.T / (2 * damping)
        correction = rows.T @ torch.linalg.solve(system, rows @ target)
        minimum = target / (2 * damping) - correction / (4 * damping**2)
    else:
        system = 2 * damping * torch.eye(size, dtype=rows.dtype, device=rows.device) + rows.T @ rows
        minimum = torch.linalg.solve(system, target)
    values = torch.zeros_like(block.w)
    values[support] = minimum
    return values


def _largest(parts: list[_Columns], betas: list[Tensor], n_keep: int) -> list[Tensor]:
    """The supports of the `n_keep` largest absolute values, dead entries last."""
    sizes = {str(i): beta.abs().masked_fill_(~part.alive, -1.0) for i, (part, beta) in enumerate(zip(parts, betas))}
    return list(select_lowest(sizes, sum(beta.numel() for beta in betas) - n_keep).values())


def _objective(parts: list[_Columns], betas: list[Tensor], damping: float) -> float:
    moves = [part.w - beta for part, beta in zip(parts, betas)]
    linear = sum(float(part.alpha.double() @ beta.double()) for part, beta in zip(parts, betas))
    return 0.5 * _norm_sq([_product(parts, moves)]) + damping * _norm_sq(moves) + linear


def _product(parts: list[_Columns], xs: list[Tensor]) -> Tensor:
    return torch.stack([part.product(x) for part, x in zip(parts, xs)]).sum(dim=0)


def _norm_sq(tensors: list[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)
