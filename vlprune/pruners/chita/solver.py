"""CHITA's problem solved: a global step, then a step and a regression of its own for every block of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlprune.pruners.chita.search import CHUNK, Part, largest, search, times

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
        n_keep: number of entries to keep.
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
    return solve_parts([Part(w[None], alpha[None], None, lambda: rows[None])], [blocks], n_keep, damping)[0]


def block_boundaries(size: int, block: int = BLOCK) -> list[int]:
    """Boundaries of nearly equal blocks of at least `block` of `size` columns (one block when there are fewer)."""
    if size < block:
        return [0, size]
    n_blocks = size // block
    step = size // n_blocks
    return [*range(0, n_blocks * step, step), size]


def solve_parts(
    parts: Sequence[Part], blocks: Sequence[Sequence[int]], n_keep: int, damping: float
) -> list[tuple[Float[Tensor, " p"], Bool[Tensor, " p"]]]:
    """New values (p,) and support (p,) of every layer; `n_keep` survivors in all of them together.

    Args:
        parts: the layers, each a batch of one problem.
        blocks: for each layer the boundaries of its column blocks, as in `solve`.
        n_keep: number of entries to keep.
        damping: factor of |w - b|^2, positive.
    """
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
