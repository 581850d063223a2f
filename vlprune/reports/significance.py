"""Paired comparisons of methods, over seeds and images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from vlprune.config import DENSE, unknown
from vlprune.reports.frame import check_comparable, rows
from vlprune.reports.load import SOURCE, per_image_of
from vlprune.reports.uncertainty import Estimate, holm, of_seeds, of_seeds_and_images
from vlprune.reports.variants import find, labels

PLACE = ["model", "task", "data", "settings", "metric", "sparsity"]
SETTING = ["model", "task", "data", "settings"]
COLUMNS = [
    *(*PLACE, "method", "variant", "seeds", "images", "difference"),
    *("low", "high", "p", "p_holm", "equivalent"),
]


def compare(
    df: pd.DataFrame, baseline: str = "omp", images: pd.DataFrame | None = None, margin: float = 1.0
) -> pd.DataFrame:
    """Differences of every method to a baseline, per model, task, data, settings, metric and sparsity.

    Both runs of a pair have the same seed and are evaluated on the same images. Where the pseudo-values of the images
    are known, the interval speaks of other seeds and other images at once (see `of_seeds_and_images`); with one seed,
    of other images alone. Where they are not, it speaks of other seeds alone, and with one seed there is none.

    Example:
        >>> df = load_results("results", "quickstart")
        >>> compare(df[df.metric == "r_mean"], baseline="omp")

    Args:
        df: as `load_results` returns it, with one run per place and seed; runs on other data or with other settings are
            compared apart.
        baseline: name of the method to compare with, or of one of its variants, "chita++ alignment=4". The dense model
            is never compared.
        images: pseudo-values, as `load_per_image` returns them; None: those that are where `df` was loaded from.
        margin: differences up to this one, in units of the metric, count as none for `equivalent`.

    Returns:
        model, task, data, settings, metric, sparsity, method, variant, seeds (their number, of those that both have),
        images (their number; 0 where their pseudo-values are not known), difference (mean of method - baseline), low
        and high (95 % interval), p (two-sided, of the same test as the interval), p_holm (corrected for all rows that
        are returned: select the metrics that are of interest first), equivalent (whether the 90 % interval lies within
        ± margin: two one-sided tests at 5 %). NaN and False where there is no interval.

    Raises:
        ValueError: the baseline is not among the methods or has several variants, or two runs in one place.
    """
    check_comparable(df, ("data", "settings"))
    pruned = df.loc[df.method != DENSE]
    is_baseline = _is_baseline(pruned, baseline)
    reference = pruned.loc[is_baseline].set_index([*PLACE, "seed"])[["value", "key"]].add_prefix("reference_")
    others = pruned.loc[~is_baseline].join(reference, on=[*PLACE, "seed"], how="inner")
    known = _known(df, images, {*others.key, *others.reference_key})
    compared = []
    for place, pairs in others.groupby([*PLACE, "method", "variant"], sort=False, observed=True):
        assert isinstance(place, tuple)
        reference = pairs[["seed"]].assign(value=pairs.reference_value, key=pairs.reference_key)
        found, n_images = paired(pairs, reference, place[PLACE.index("metric")], known)
        (low, high), (least, most) = found.interval(), found.interval(0.9)
        equivalent = -margin < least and most < margin
        compared.append((*place, len(pairs), n_images, found.mean, low, high, found.p(), equivalent))
    result = pd.DataFrame(compared, columns=[name for name in COLUMNS if name != "p_holm"])
    result["p_holm"] = holm(result.p.to_numpy())
    return result.reindex(columns=COLUMNS)


def paired(
    runs: pd.DataFrame, others: pd.DataFrame, metric: str, known: Mapping[str, pd.DataFrame]
) -> tuple[Estimate, int]:
    """The mean difference of runs to others of the same seeds, and the number of images whose pseudo-values it is of.

    Args:
        runs: columns seed, value, key.
        others: the same columns; seeds that one of them lacks do not count.
        metric: name of the metric that the values are of.
        known: {run key: pseudo-values (images, metrics)} of the runs of which they are known; without those of all,
            the difference is one over seeds, and the number of images is 0.
    """
    both = runs[["seed", "value", "key"]].merge(others[["seed", "value", "key"]], on="seed", suffixes=("", "_other"))
    if both.empty:
        return Estimate(float("nan"), float("nan"), 1), 0
    found = of_seeds((both.value - both.value_other).to_numpy())
    of_images = _differences(known, metric, zip(both.key, both.key_other, strict=True))
    if of_images is None:
        return found, 0
    return replace(of_seeds_and_images(of_images), mean=found.mean), of_images.shape[1]


def _known(df: pd.DataFrame, images: pd.DataFrame | None, keys: set[str]) -> Mapping[str, pd.DataFrame]:
    """{key: pseudo-values (images, metrics)} of the runs of which they are known."""
    if images is None:
        source = df.attrs.get(SOURCE)
        return {} if source is None else per_image_of(source, keys)
    wide = images.pivot_table("value", ["key", "image_id"], "metric", observed=True)
    return {str(key): own.droplevel("key").dropna(axis=1) for key, own in wide.groupby("key", observed=True)}


def _differences(known: Mapping[str, pd.DataFrame], metric: str, pairs: Iterable[tuple[str, str]]) -> np.ndarray | None:
    """(seeds, images) differences of pseudo-values; None where those of a run are not known."""
    found = []
    for keys in pairs:
        own, other = (known[key][metric] if metric in known.get(key, ()) else None for key in keys)
        if own is None or other is None:
            return None
        found.append(own - other.reindex(own.index))
    together = np.array([own.reindex(found[0].index) for own in found])
    return None if np.isnan(together).any() or together.shape[1] < 2 else together


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
