"""Which methods of a column are not distinguishable from the best."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from vlprune.config import DENSE
from vlprune.reports.caption import LEVEL
from vlprune.reports.frame import rows
from vlprune.reports.significance import paired
from vlprune.reports.uncertainty import holm

COLUMN = ["model", "task", "metric", "sparsity"]


def leaders(long: pd.DataFrame, known: Mapping[str, pd.DataFrame]) -> frozenset[tuple]:
    """(model, label, sparsity, task, metric) of the methods that are not distinguishable from the best of their column.

    Those of the highest mean, and those whose paired difference to it is not significant at 5 %, corrected by Holm
    (1979) over the column. A method whose mean is not above the highest floor is never among them, and where the
    highest mean is not, none is. Where a difference has no interval, with one seed and no pseudo-values, its method is
    not among them, and a best one that differs from nobody by a test is not either: nothing is known of that column.

    Args:
        long: as `frame` returns it.
        known: {run key: pseudo-values (images, metrics)}, as `per_image_of` returns them.
    """
    found: set[tuple] = set()
    pruned = long.loc[long.method != DENSE]
    for model, task, metric, sparsity in pruned[COLUMN].drop_duplicates().itertuples(index=False):
        own = rows(pruned, model=model, task=task, metric=metric, sparsity=sparsity)
        methods = {label: rows(own, label=label) for label in own.label.unique()}
        means = {label: float(runs.value.mean()) for label, runs in methods.items()}
        best, *others = sorted(means, key=lambda label: -means[label])
        tested = [paired(methods[best], methods[label], str(metric), known)[0].p() for label in others]
        p = holm(tested)
        if not np.isfinite(p).any():
            continue
        near = [best, *(label for label, own_p in zip(others, p, strict=True) if own_p > LEVEL)]
        floors = {label: runs.floor.mean() for label, runs in methods.items()}
        found |= {(model, label, sparsity, task, metric) for label in near if not means[label] <= floors[label]}
    return frozenset(found)
