"""CHITA in compiled loops, as in `dense_chita.py` but by numba (and SciPy for its linear algebra), in float64."""

from __future__ import annotations

import numpy as np
from numba import njit  # pyright: ignore[reportMissingImports]

Array = np.ndarray


@njit(cache=True, fastmath=True)
def solve(w: Array, rows: Array, n_keep: int, alpha: Array, damping: float, blocks: Array) -> Array:
    """The pruned weights (p,); arguments as in `dense_chita.solve`, `blocks` as an array."""
    beta, kept = search(w, rows, w, n_keep, alpha, damping)
    values = np.zeros_like(w)
    for block in range(len(blocks) - 1):
        start, end = blocks[block], blocks[block + 1]
        n_block = 0
        for i in range(start, end):
            n_block += kept[i]
        if n_block > 0:
            own, inside, first = w[start:end].copy(), rows[:, start:end].copy(), alpha[start:end].copy()
            _, support = search(own, inside, beta[start:end].copy(), n_block, first, damping)
            values[start:end] = regress(own, inside, support, first, damping)
    return values


@njit(cache=True, fastmath=True)
def largest(x: Array, n_keep: int) -> Array:
    """Which entries have the largest absolute values; of equal ones, the last."""
    support = np.zeros(len(x), dtype=np.bool_)
    size = np.abs(x)
    if n_keep == 0:
        return support
    cut = np.partition(size, len(x) - n_keep)[len(x) - n_keep]
    left = n_keep
    for i in range(len(x)):
        if size[i] > cut:
            support[i] = True
            left -= 1
    for i in range(len(x) - 1, -1, -1):
        if left > 0 and size[i] == cut:
            support[i] = True
            left -= 1
    return support


@njit(cache=True, fastmath=True)
def product(rows: Array, x: Array) -> Array:
    """rows @ x, (n,)."""
    found = np.zeros(len(rows))
    for r in range(len(rows)):
        total = 0.0
        for i in range(len(x)):
            total += rows[r, i] * x[i]
        found[r] = total
    return found


@njit(cache=True, fastmath=True)
def objective(w: Array, rows: Array, beta: Array, alpha: Array, damping: float) -> float:
    """0.5 |rows (w - beta)|² + damping |w - beta|² + alpha · beta."""
    residual = product(rows, w - beta)
    total = 0.5 * np.sum(residual * residual)
    for i in range(len(w)):
        total += damping * (w[i] - beta[i]) ** 2 + alpha[i] * beta[i]
    return total


@njit(cache=True, fastmath=True)
def keeps_support(beta: Array, gradient: Array, support: Array, length: float) -> bool:
    """Whether the largest entry after a step is still within the support."""
    within, beyond = 0.0, -1.0
    for i in range(len(beta)):
        size = abs(beta[i] - length * gradient[i])
        if support[i]:
            within = max(within, size)
        else:
            beyond = max(beyond, size)
    return within >= beyond - 1e-10


@njit(cache=True, fastmath=True)
def search(w: Array, rows: Array, beta: Array, n_keep: int, alpha: Array, damping: float) -> tuple[Array, Array]:
    """A projected gradient step with a line search: new weights and their support."""
    support = largest(beta, n_keep)
    if np.sqrt(np.sum(alpha * alpha)) <= 1e-8 or n_keep == 0:
        return beta * support, support
    residual = product(rows, w - beta)
    gradient = alpha + 2 * damping * (beta - w)
    for r in range(len(rows)):
        for i in range(len(w)):
            gradient[i] -= rows[r, i] * residual[r]
    inside = gradient * support
    slope = np.sum(inside * inside)
    if slope == 0:
        return beta * support, support
    along = product(rows, inside)
    length = slope / (np.sum(along * along) + 2 * damping * slope)
    if keeps_support(beta, gradient, support, length):
        return (beta - length * gradient) * support, support
    for _ in range(100):
        length /= 2
        if keeps_support(beta, gradient, support, length):
            break
    best, best_support = beta * support, support
    least = objective(w, rows, best, alpha, damping)
    for _ in range(10):
        stepped = beta - length * gradient
        trial_support = largest(stepped, n_keep)
        trial = stepped * trial_support
        found = objective(w, rows, trial, alpha, damping)
        if found >= least:
            break
        best, best_support, least = trial, trial_support, found
        length *= 2
    return best, best_support


@njit(cache=True, fastmath=True)
def regress(w: Array, rows: Array, support: Array, alpha: Array, damping: float) -> Array:
    """The exact minimum on a support, through the smaller of the two linear systems."""
    columns = np.nonzero(support)[0]
    n, size = len(rows), len(columns)
    inside = np.empty((n, size))
    for r in range(n):
        for i in range(size):
            inside[r, i] = rows[r, columns[i]]
    target = inside.T @ product(rows, w) + 2 * damping * w[columns] - alpha[columns]
    if n < size:
        system = np.eye(n) + inside @ inside.T / (2 * damping)
        correction = inside.T @ np.linalg.solve(system, inside @ target)
        found = target / (2 * damping) - correction / (4 * damping**2)
    else:
        found = np.linalg.solve(2 * damping * np.eye(size) + inside.T @ inside, target)
    values = np.zeros_like(w)
    values[columns] = found
    return values
