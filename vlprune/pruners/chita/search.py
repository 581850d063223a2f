"""A projected gradient step for CHITA's problem, its length found by a line search, for many problems at once.

The problem is that of `vlprune.pruners.chita`. Benbaki et al. 2023 (arXiv:2302.14623).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.selection import select_lowest

CHUNK = 1 << 20  # entries of the rows that are read at a time: they stay in the cache
_HALVINGS = 100
_DOUBLINGS = 10
_SLACK = 1e-10
_NO_ALPHA = 1e-8


@dataclass(frozen=True)
class Part:
    """Columns of a batch of B problems of equal size: a layer (B = 1), or B of its blocks.

    Attributes:
        w: (B, q) weights.
        alpha: (B, q) first-order terms.
        alive: (B, q) bool, entries that may be kept; None for all.
        rows: () -> the gradient rows (B, n, q).
    """

    w: Tensor
    alpha: Tensor
    alive: Tensor | None
    rows: Callable[[], Tensor]

    def product(self, x: Tensor) -> Tensor:
        """rows @ x, (B, n), of x (B, q); summed over chunks of columns in float64."""
        rows = self.rows()
        step = max(1, CHUNK // (rows.shape[0] * rows.shape[1]))
        return _total(times(*chunks).double() for chunks in zip(rows.split(step, 2), x.split(step, 1)))

    def gradient(self, beta: Tensor, residual: Tensor | None, damping: float) -> Tensor:
        """Gradient (B, q) of the objective at beta, zero at dead entries.

        residual (B, n) is rows @ (w - beta); None where beta is w, without a pass over the rows.
        """
        gradient = self.alpha
        if residual is not None:
            rows = self.rows()
            gradient = gradient + 2 * damping * (beta - self.w) - (residual.to(rows.dtype)[:, None] @ rows).squeeze(1)
        return gradient if self.alive is None else gradient * self.alive

    def select(self, which: Tensor) -> Part:
        """The problems for which `which` (B,) is True."""
        alive = None if self.alive is None else self.alive[which]
        return Part(self.w[which], self.alpha[which], alive, lambda: self.rows()[which])


@dataclass(frozen=True)
class Step:
    """The end of a search: beta - length * gradient on the supports, zero elsewhere.

    Attributes:
        betas: for each part (B, q), where the step started.
        gradients: for each part (B, q).
        length: (B,).
        supports: for each part (B, q) bool.
    """

    betas: Sequence[Tensor]
    gradients: Sequence[Tensor]
    length: Tensor
    supports: Sequence[Tensor]

    def beta(self, i: int) -> Tensor:
        """The betas (B, q) of part number i after the step."""
        return _moved(self.betas[i], self.gradients[i], self.length) * self.supports[i]


def search(
    parts: Sequence[Part], betas: Sequence[Tensor], supports: Sequence[Tensor], n_keep: Tensor, damping: float
) -> Step:
    """A projected gradient step from betas (B, q), its length found by a line search, for each of B problems.

    Args:
        parts: the columns of the problems, in one part or several.
        betas: for each part (B, q), where to start.
        supports: for each part (B, q) bool, the `n_keep` largest entries of betas.
        n_keep: (B,) number of entries to keep.
        damping: factor of |w - b|^2, positive.
    """
    residual = None
    if any(beta is not part.w for part, beta in zip(parts, betas)):
        residual = _total(part.product(part.w - beta) for part, beta in zip(parts, betas))
    gradients = [part.gradient(beta, residual, damping) for part, beta in zip(parts, betas)]
    slope = _total(_norm_sq(gradient * support) for gradient, support in zip(gradients, supports))
    along = _total(part.product(g * support) for part, g, support in zip(parts, gradients, supports))
    curvature = _norm_sq(along) + 2 * damping * slope
    # The exact minimum along the gradient within the support; without a first-order term, betas as they are.
    still = (_total(_norm_sq(part.alpha) for part in parts) <= _NO_ALPHA**2) | (n_keep == 0) | (slope == 0)
    length = torch.where(still, 0.0, slope / curvature.clamp_min(torch.finfo(curvature.dtype).tiny))
    fails = ~(still | _keeps_support(parts, betas, gradients, supports, length))
    if not fails.any():
        return Step(betas, gradients, length, supports)
    # Only the problems whose support changes go on.
    if len(fails) > 1:
        own = [part.select(fails) for part in parts]
        some_betas, some_gradients, some_supports = (
            [tensor[fails] for tensor in t] for t in (betas, gradients, supports)
        )
        searched = _line_search(own, some_betas, some_gradients, some_supports, length[fails], n_keep[fails], damping)
        length[fails] = searched.length
        supports = [support.clone() for support in supports]
        for support, found in zip(supports, searched.supports):
            support[fails] = found
        return Step(betas, gradients, length, supports)
    return _line_search(parts, betas, gradients, supports, length, n_keep, damping)


def _line_search(
    parts: Sequence[Part],
    betas: Sequence[Tensor],
    gradients: Sequence[Tensor],
    supports: Sequence[Tensor],
    length: Tensor,
    n_keep: Tensor,
    damping: float,
) -> Step:
    """Halves the length until the support is kept, then doubles it while the objective falls."""
    keeps = torch.zeros_like(length, dtype=torch.bool)
    for _ in range(_HALVINGS):
        length = torch.where(keeps, length, length / 2)
        keeps |= _keeps_support(parts, betas, gradients, supports, length)
        if keeps.all():
            break
    best = Step(betas, gradients, torch.zeros_like(length), supports)
    least, active = _objective(parts, best, damping), torch.ones_like(keeps)
    for _ in range(_DOUBLINGS):
        stepped = [_moved(beta, gradient, length) for beta, gradient in zip(betas, gradients)]
        trial = Step(betas, gradients, length, largest(parts, stepped, n_keep))
        objective = _objective(parts, trial, damping)
        active &= objective < least
        if not active.any():
            break
        least = torch.where(active, objective, least)
        chosen = [torch.where(active[:, None], new, old) for new, old in zip(trial.supports, best.supports)]
        best = Step(betas, gradients, torch.where(active, length, best.length), chosen)
        length = length * 2
    return best


def _keeps_support(
    parts: Sequence[Part],
    betas: Sequence[Tensor],
    gradients: Sequence[Tensor],
    supports: Sequence[Tensor],
    length: Tensor,
) -> Tensor:
    """Whether (B,) the largest entry after a step is still within the support (a weak test, as published)."""
    within, beyond = torch.zeros_like(length), torch.zeros_like(length)
    for part, beta, gradient, support in zip(parts, betas, gradients, supports):
        stepped = _moved(beta, gradient, length).abs_()
        others = ~support if part.alive is None else part.alive & ~support
        within = within.maximum((stepped * support).amax(1))
        beyond = beyond.maximum(stepped.mul_(others).amax(1))
    return within >= beyond - _SLACK


def largest(parts: Sequence[Part], betas: Sequence[Tensor], n_keep: Tensor) -> list[Tensor]:
    """The supports of the `n_keep` largest absolute values of every problem, dead entries last."""
    sizes = [
        beta.abs() if part.alive is None else beta.abs().masked_fill_(~part.alive, -1.0)
        for part, beta in zip(parts, betas)
    ]
    if len(n_keep) == 1:
        scores = {str(i): size for i, size in enumerate(sizes)}
        n_pruned = sum(size.numel() for size in sizes) - int(n_keep)
        return list(select_lowest(scores, n_pruned).values())
    [size] = sizes
    order = size.argsort(dim=1, stable=True)
    place = torch.arange(size.shape[1], device=size.device)
    support = torch.empty_like(size, dtype=torch.bool)
    return [support.scatter_(1, order, place >= size.shape[1] - n_keep[:, None])]


def _objective(parts: Sequence[Part], step: Step, damping: float) -> Tensor:
    """The objective of every problem after a step, (B,) float64."""
    product, others = [], []
    for i, part in enumerate(parts):
        beta = step.beta(i)
        move = part.w - beta
        product.append(part.product(move))
        others.append(damping * _norm_sq(move) + (part.alpha.double() * beta.double()).sum(1))
    return 0.5 * _norm_sq(_total(product)) + _total(others)


def times(rows: Tensor, x: Tensor) -> Tensor:
    """(B, n) products of rows (B, n, q) and x (B, q); in this order, as products with columns are slow on a CPU."""
    return (x[:, None] @ rows.transpose(1, 2)).squeeze(1)


def _moved(beta: Tensor, gradient: Tensor, length: Tensor) -> Tensor:
    return beta - length.to(beta.dtype)[:, None] * gradient


def _norm_sq(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(dim=0)
