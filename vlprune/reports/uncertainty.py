"""How far a mean over seeds and images is known: one interval and one p-value from the same variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean, with its standard error and the degrees of freedom of Student's t that it is judged by.

    Attributes:
        mean: the mean.
        error: its standard error; NaN where nothing tells.
        freedom: degrees of freedom.
    """

    mean: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that holds the true mean with this probability; NaN where the error is not known."""
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """The two-sided p-value of a true mean of zero; NaN where the error is not known."""
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))


def of_seeds(values: Sequence[float]) -> Estimate:
    """The mean over seeds on one test set: Student's t, which says nothing of other images.

    Args:
        values: a value for each seed; with one seed the error is not known.
    """
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Estimate(float(np.mean(values)), error, max(1, n - 1))


def of_seeds_and_images(values: np.ndarray) -> Estimate:
    """The mean over seeds and images, both of which could have been others.

    All seeds are evaluated on the same images, so that the two factors cross: the variance of the mean is (seeds +
    images - rest) / number of values, of the mean squares of a two-way layout without replication, and its degrees of
    freedom are Satterthwaite's (1946, Biometrics Bulletin 2). Where the rest is larger than both, the larger one of the
    two stands for the variance, which makes the interval wider. With one seed, the mean is that of this seed and the
    images alone vary.

    A bootstrap of seeds and images, which one could think of, sees two thirds of the variance of three seeds and thrice
    that of the rest: its 95 % intervals hold the truth in 84 to 99.8 % (results/benchmarks/coverage.md), these in 94 to
    98.5.

    Args:
        values: (seeds, images), such as the differences of the pseudo-values of two runs; at least two images.
    """
    n_seeds, n_images = values.shape
    mean = float(values.mean())
    of_image, of_seed = values.mean(0), values.mean(1)
    images = n_seeds * float(((of_image - mean) ** 2).sum()) / (n_images - 1)
    if n_seeds == 1:
        return Estimate(mean, float(np.sqrt(images / n_images)), n_images - 1)
    seeds = n_images * float(((of_seed - mean) ** 2).sum()) / (n_seeds - 1)
    left = values - of_image - of_seed[:, None] + mean
    freedom = (n_seeds - 1) * (n_images - 1)
    rest = float((left**2).sum()) / freedom
    variance = seeds + images - rest
    if variance > 0:
        parts = seeds**2 / (n_seeds - 1) + images**2 / (n_images - 1) + rest**2 / freedom
        degrees = max(1.0, variance**2 / parts)
    else:
        variance, degrees = max((seeds, n_seeds - 1), (images, n_images - 1))
    return Estimate(mean, float(np.sqrt(variance / values.size)), degrees)


def holm(p: Sequence[float]) -> np.ndarray:
    """The p-values corrected by Holm (1979): that any of those at most α is of no true difference has probability ≤ α.

    Args:
        p: (n,) p-values of one family of tests; NaN where there was no test, which stays and does not count.
    """
    values = np.asarray(p, float)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    found = np.full(len(values), np.nan)
    steps = values[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(order) else steps
    return found
