"""Paired comparisons of methods over seeds."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from vlprune.config import DENSE, unknown
from vlprune.reports.frame import check_comparable, rows
from vlprune.reports.variants import find, labels

PLACE = ["model", "task", "data", "settings", "metric", "sparsity"]
SETTING = ["model", "task", "data", "settings"]
COLUMNS = [*PLACE, "method", "variant", "pairs", "difference", "low", "high", "p"]
FLIPS = 2**16


def compare(df: pd.DataFrame, baseline: str = "omp") -> pd.DataFrame:
    """Differences of every method to a baseline, paired by seed, per model, task, data, settings, metric and sparsity.

    Both runs of a pair share their seed, so the interval speaks of calibration and fine-tuning noise on one test set,
    not of other test sets. With one seed there is a difference, but neither an interval nor a p-value.

    Args:
        df: as `load_results` returns it, with one run per place and seed; runs on other data or with other settings are
            compared apart.
        baseline: name of the method to compare with, or of one of its variants, "chita++ alignment=4". The dense model
            is never compared.

    Returns:
        model, task, data, settings, metric, sparsity, method, variant, pairs (number of seeds that both have),
        difference (mean of method - baseline), low and high (95 % interval of Student's t), p (two-sided, see
        `sign_flip`); the last three are NaN below 2 pairs.

    Raises:
        ValueError: the baseline is not among the methods or has several variants, or two runs in one place.
    """
    check_comparable(df, ("data", "settings"))
    pruned = df.loc[df.method != DENSE]
    is_baseline = _is_baseline(pruned, baseline)
    reference = pruned.loc[is_baseline].set_index([*PLACE, "seed"]).value
    others = pruned.loc[~is_baseline].join(reference.rename("reference"), on=[*PLACE, "seed"], how="inner")
    compared = []
    for key, pairs in others.groupby([*PLACE, "method", "variant"], sort=False, observed=True):
        assert isinstance(key, tuple)
        difference = (pairs.value - pairs.reference).to_numpy()
        compared.append((*key, len(difference), difference.mean(), *_interval(difference), sign_flip(difference)))
    return pd.DataFrame(compared, columns=COLUMNS)


def _is_baseline(pruned: pd.DataFrame, baseline: str) -> pd.Series:
    # A name means another variant where the settings of a whole table are others, hence one look-up a setting.
    found = pd.Series(False, index=pruned.index)
    for _, own in pruned.groupby(SETTING, sort=False, observed=True):
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
    if len(difference) < 2:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        # Equal differences are an interval of no width, however precise their variance.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        low, high = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    return float(low), float(high)


def sign_flip(difference: np.ndarray) -> float:
    """The two-sided p-value of a mean difference of zero, by flips of the signs of the pairs; NaN below 2 pairs.

    Exact, at best 2 / 2**pairs, up to 16 pairs; above from 2**16 random flips, the same ones each time.

    Args:
        difference: (pairs,).
    """
    if len(difference) < 2:
        return float("nan")
    # Sums that differ by rounding alone are equal.
    scaled = difference / (np.abs(difference).max() or 1)
    test = stats.permutation_test(
        (scaled,),
        lambda flipped, axis: flipped.sum(axis=axis).round(9),
        permutation_type="samples",
        n_resamples=FLIPS,
        batch=4096,
        rng=0,
    )
    return float(test.pvalue)
