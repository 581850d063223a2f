"""CHITA and CHITA++: an L0-constrained quadratic model of the loss, solved by a line search and block-wise regression.

Benbaki et al. 2023 (arXiv:2302.14623), with the first-order term and the blocks that Farina et al. 2024
(arXiv:2404.05621) use for vision-language models. The problem, for weights w (p,), gradient rows A (n, p), a
first-order term alpha (p,), damping d > 0 and k entries to keep, is

    minimize over b, at most k non-zeros:   0.5 |A (w - b)|^2 + d |w - b|^2 + alpha . b

A global step along the gradient says how many entries each block of columns keeps; a step of its own says which ones,
and their values are the exact minimum on them. Rows are only read layer by layer and blocks of equal size are solved
together, so that beyond the rows memory is that of about four vectors of p entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlprune.masks import Masks
from vlprune.pruners.iterate import STEPS
from vlprune.pruners.l0_search import CHUNK, Part, largest, search, times
from vlprune.pruners.pruner import Alive, Pruner, Stats, Weights

LAM = 1e-2  # ridge per row
BLOCK = 10_000  # columns solved together


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
    with the threshold are all lost); a block may be kept whole (there an error); the values of a block come
    from a float64 system of n by n without cancellation (there float32, unstable for a small damping).
    """
    if blocks[0] != 0 or blocks[-1] != len(w) or any(a > b for a, b in pairwise(blocks)):
        raise ValueError(f"blocks must rise from 0 to {len(w)}, got {list(blocks)}")
    return _solve([Part(w[None], alpha[None], None, lambda: rows[None])], [blocks], n_keep, damping)[0]


def block_boundaries(size: int, block: int = BLOCK) -> list[int]:
    """Boundaries of nearly equal blocks of at least `block` of `size` columns (one block when there are fewer)."""
    if size < block:
        return [0, size]
    n_blocks = size // block
    step = size // n_blocks
    return [*range(0, n_blocks * step, step), size]


def chita_update(weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None, lam: float = LAM) -> Masks:
    """Survivors of all layers and their new values.

    The first-order term is the sum of the rows over the samples B behind a row: a mean gradient of B samples stands for
    1/B of the Fisher information of a sample, so that this is the expansion of one loss. The reference takes B from its
    first batch; here it is the mean over the batches.

    Args:
        weights: {layer name: (out, in)}.
        stats: `grad_rows` (n, out * in) of every layer, mean-batch gradients, as many rows in each, and `row_size` ().
            Rows are looked up anew for every pass over them.
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
        alpha = (stats[name]["grad_rows"].sum(dim=0) / stats[name]["row_size"]).to(weight.dtype)
        if not alpha.isfinite().all():
            raise ValueError(f"layer '{name}': gradient rows must be finite, got NaN or infinity")
        mask = None if alive is None else alive[name].view(1, -1)
        parts.append(Part(weight.reshape(1, -1), alpha[None], mask, partial(_rows, stats, name)))
    n_keep = sum(weight.numel() for weight in weights.values()) - n_pruned
    blocks = [block_boundaries(weight.numel()) for weight in weights.values()]
    solved = _solve(parts, blocks, n_keep, damping=max(n_rows.values()) * lam / 2)
    return Masks(
        {name: support.view_as(weights[name]) for name, (_, support) in zip(weights, solved)},
        {name: values.view_as(weights[name]) for name, (values, _) in zip(weights, solved)},
    )


CHITA = Pruner(
    name="chita",
    source="Benbaki et al. 2023 (arXiv:2302.14623)",
    needs=frozenset({"grad_rows", "row_size"}),
    update=chita_update,
    version=2,
)
CHITA_PP = replace(CHITA, name="chita++", source="CHITA in steps, Benbaki et al. 2023 (arXiv:2302.14623)", search=STEPS)


def _rows(stats: Stats, name: str) -> Float[Tensor, "1 n p"]:
    return stats[name]["grad_rows"][None]


def _solve(
    parts: Sequence[Part], blocks: Sequence[Sequence[int]], n_keep: int, damping: float
) -> list[tuple[Tensor, Tensor]]:
    """New values (p,) and support (p,) of every layer; `n_keep` survivors in all of them together."""
    n_alive = sum(part.w.numel() if part.alive is None else int(part.alive.sum()) for part in parts)
    if not 0 <= n_keep <= n_alive:
        raise ValueError(f"cannot keep {n_keep} of {n_alive} entries")
    if damping <= 0:
        raise ValueError(f"damping must be positive, got {damping}")
    weights = [part.w for part in parts]
    wanted = torch.tensor([n_keep], device=weights[0].device)
    step = search(parts, weights, largest(parts, weights, wanted), wanted, damping)
    return [
        _solve_blocks(part, step.beta(i)[0], step.supports[i][0], blocks[i], damping) for i, part in enumerate(parts)
    ]


def _solve_blocks(
    part: Part, beta: Tensor, support: Tensor, blocks: Sequence[int], damping: float
) -> tuple[Tensor, Tensor]:
    """Values and survivors (p,) of a layer; beta and support (p,) are where the global step ended."""
    values, survivors = torch.zeros_like(beta), torch.zeros_like(support)
    for problem, start, end in _batches(part, blocks):
        # The global step says how many entries a block keeps; which ones, the block decides again.
        own, kept = (tensor[start:end].view(problem.w.shape) for tensor in (beta, support))
        found = search([problem], [own], [kept], kept.sum(1), damping).supports[0]
        survivors[start:end] = found.flatten()
        values[start:end] = _regress(problem, found, damping).flatten()
    return values, survivors


def _batches(part: Part, blocks: Sequence[int]) -> Iterator[tuple[Part, int, int]]:
    """Blocks of a layer as batches of equal size, with the columns where each batch starts and ends."""
    rows = part.rows()[0]
    start = 0
    for size, run in groupby(b - a for a, b in pairwise(blocks) if a < b):
        left, most = len(list(run)), max(1, CHUNK // (len(rows) * size))
        while left:
            count = min(left, most)
            end = start + count * size
            own = rows[:, start:end].view(len(rows), count, size).transpose(0, 1)
            w, alpha = (tensor[0, start:end].view(count, size) for tensor in (part.w, part.alpha))
            alive = None if part.alive is None else part.alive[0, start:end].view(count, size)
            yield Part(w, alpha, alive, partial(_same, own)), start, end
            start, left = end, left - count


def _same(rows: Tensor) -> Tensor:
    return rows


def _regress(block: Part, support: Tensor, damping: float) -> Tensor:
    """The exact minimum (B, q) on supports (B, q).

    The residual u at the minimum solves (2 d I + A_S A_S') u = 2 d A_C w_C + A_S alpha_S, for the support S and the
    pruned C; the survivors move by (A_S' u - alpha_S) / (2 d).
    """
    counts = support.sum(1)
    most = int(counts.max())
    column = torch.zeros(len(support), most, dtype=torch.int64, device=support.device)
    used = torch.arange(most, device=support.device) < counts[:, None]
    column[used] = support.nonzero()[:, 1]
    rows = block.rows()
    inside = rows.gather(2, column[:, None].expand(-1, rows.shape[1], -1)).double().mul_(used[:, None])
    w, alpha = (tensor.gather(1, column).double().mul_(used) for tensor in (block.w, block.alpha))
    pruned = times(rows, block.w * ~support).double()
    system = inside @ inside.transpose(1, 2)
    system.diagonal(dim1=1, dim2=2).add_(2 * damping)
    target = 2 * damping * pruned + times(inside, alpha)
    residual = torch.linalg.solve(system, target)
    moved = w + ((residual[:, None] @ inside).squeeze(1) - alpha) / (2 * damping)
    return torch.zeros_like(block.w).masked_scatter_(support, moved[used].to(block.w.dtype))
