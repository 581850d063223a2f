"""Paired comparisons of methods over seeds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from vlprune.config import DENSE, unknown
from vlprune.reports.frame import check_comparable, rows
from vlprune.reports.variants import find, labels

PLACE = ["model", "task", "data", "settings", "metric", "sparsity"]
SETTING = ["model", "task", "data", "settings"]
COLUMNS = [*PLACE, "method", "variant", "pairs", "difference", "low", "high", "p"]
MOST_PAIRS = 16


def compare(df: pd.DataFrame, baseline: str = "omp") -> pd.DataFrame:
    """Differences of every method to a baseline, paired by seed, per model, task, data, settings, metric and sparsity.

    Both runs of a pair share their seed, so the interval speaks of calibration and fine-tuning noise on one test set,
    not of other test sets. With one seed there is a difference, but neither an interval nor a p-value.

    Args:
        df: of `load_results`, with one run per place and seed; runs on other data or with other settings are apart.
        baseline: the method to compare with; where it has several variants, the name of one, "chita++ alignment=4". The
            dense model is never compared.

    Returns:
        model, task, data, settings, metric, sparsity, method, variant, pairs (seeds that both have), difference (mean
        of method - baseline), low and high (95 % interval of Student's t), p (exact two-sided sign-flip test, at best
        2 / 2**pairs); the last three are NaN below 2 pairs.

    Raises:
        ValueError: the baseline is not among the methods or has several variants, two runs in one place, or more than
            16 seeds.
    """
    check_comparable(df, ("data", "settings"))
    pruned = df.loc[df.method != DENSE]
    is_baseline = _is_baseline(pruned, baseline)
    reference = pruned.loc[is_baseline].set_index([*PLACE, "seed"]).value
    others = pruned.loc[~is_baseline].join(reference.rename("reference"), on=[*PLACE, "seed"], how="inner")
    compared = []
    for key, pairs in others.groupby([*PLACE, "method", "variant"], sort=False):
        assert isinstance(key, tuple)
        difference = (pairs.value - pairs.reference).to_numpy()
        compared.append((*key, len(difference), difference.mean(), *_interval(difference), sign_flip(difference)))
    return pd.DataFrame(compared, columns=COLUMNS)


def _is_baseline(pruned: pd.DataFrame, baseline: str) -> pd.Series:
    # A name means another variant where the settings of a whole table are others, hence one look-up a setting.
    found = pd.Series(False, index=pruned.index)
    for _, own in pruned.groupby(SETTING, sort=False):
        meant = find(baseline, zip(own.method, own.variant, strict=True))
        if len(meant) > 1:
            method = meant[0][0]
            names = labels((method, variant) for variant in rows(own, method=method).variant)
            raise ValueError(f"baseline {baseline!r} has several variants, name one of: {', '.join(names.values())}")
        for method, variant in meant:
            found[rows(own, method=method, variant=variant).index] = True
    if not found.any():
        raise ValueError(unknown("baseline", baseline, labels(zip(pruned.method, pruned.variant)).values()))
    return found


def _interval(difference: np.ndarray) -> tuple[float, float]:
    n = len(difference)
    if n < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    return difference.mean() - half, difference.mean() + half


def sign_flip(difference: np.ndarray) -> float:
    """The exact two-sided p-value of a mean difference of zero, over all 2**n flips of the signs; NaN below 2 pairs."""
    n = len(difference)
    if n < 2:
        return float("nan")
    if n > MOST_PAIRS:
        raise ValueError(f"the exact test goes up to {MOST_PAIRS} pairs, got {n}")
    flips = np.array(list(product((-1.0, 1.0), repeat=n)))
    sums = np.abs(flips @ difference)
    # A sum counts as reached despite rounding.
    return float(np.mean(sums >= abs(difference.sum()) * (1 - 1e-12)))
