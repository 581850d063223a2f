"""CHITA as one would first write it: dense NumPy, block after block; what vlprune.pruners.chita is measured against."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Array = np.ndarray


def solve(w: Array, rows: Array, n_keep: int, alpha: Array, damping: float, blocks: list[int]) -> Array:
    """The pruned weights (p,); arguments as in vlprune.pruners.chita.solve, in any float type."""
    beta, kept = search(w, rows, w, n_keep, alpha, damping)
    values = np.zeros_like(w)
    for start, end in pairwise(blocks):
        part = slice(start, end)
        if n_block := int(kept[part].sum()):
            problem = w[part], rows[:, part]
            _, support = search(*problem, beta[part], n_block, alpha[part], damping)
            values[part] = regress(*problem, support, alpha[part], damping)
    return values


def objective(w: Array, rows: Array, beta: Array, alpha: Array, damping: float) -> float:
    """0.5 |rows (w - beta)|² + damping |w - beta|² + alpha · beta."""
    residual = rows @ (w - beta)
    return 0.5 * residual @ residual + damping * np.square(w - beta).sum() + alpha @ beta


def largest(x: Array, n_keep: int) -> Array:
    """Which entries have the largest absolute values; of equal ones, the last."""
    support = np.zeros(len(x), dtype=bool)
    support[np.argsort(np.abs(x), kind="stable")[len(x) - n_keep :]] = True
    return support


def search(w: Array, rows: Array, beta: Array, n_keep: int, alpha: Array, damping: float) -> tuple[Array, Array]:
    """A projected gradient step with a line search: new weights and their support."""
    support = largest(beta, n_keep)
    if np.linalg.norm(alpha) <= 1e-8 or n_keep == 0:
        return beta * support, support
    gradient = -rows.T @ (rows @ (w - beta)) + alpha + 2 * damping * (beta - w)
    inside = gradient * support
    slope = inside @ inside
    if slope == 0:
        return beta * support, support
    length = slope / (np.square(rows @ inside).sum() + 2 * damping * slope)

    def keeps_support(length: float) -> bool:
        stepped = np.abs(beta - length * gradient)
        return stepped[support].max() >= stepped[~support].max(initial=-np.inf) - 1e-10

    if keeps_support(length):
        return (beta - length * gradient) * support, support
    for _ in range(100):
        length /= 2
        if keeps_support(length):
            break
    best = beta * support, support
    least = objective(w, rows, best[0], alpha, damping)
    for _ in range(10):
        stepped = beta - length * gradient
        trial_support = largest(stepped, n_keep)
        trial = stepped * trial_support
        found = objective(w, rows, trial, alpha, damping)
        if found >= least:
            break
        best, least = (trial, trial_support), found
        length *= 2
    return best


def regress(w: Array, rows: Array, support: Array, alpha: Array, damping: float) -> Array:
    """The exact minimum on a support, through the smaller of the two linear systems."""
    inside = rows[:, support]
    n, size = inside.shape
    target = inside.T @ (rows @ w) + 2 * damping * w[support] - alpha[support]
    values = np.zeros_like(w)
    if n < size:
        system = np.eye(n) + inside @ inside.T / (2 * damping)
        correction = inside.T @ np.linalg.solve(system, inside @ target)
        values[support] = target / (2 * damping) - correction / (4 * damping**2)
    else:
        values[support] = np.linalg.solve(2 * damping * np.eye(size) + inside.T @ inside, target)
    return values
