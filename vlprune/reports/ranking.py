"""Average ranks of methods over the cells of a table, with what chance alone would make of them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlprune.config import DENSE

CELL = ["model", "task", "data", "settings", "metric", "sparsity"]
BLOCK = ("model", "sparsity")
PERMUTATIONS = 10_000


def ranks(df: pd.DataFrame, block: tuple[str, ...] = BLOCK) -> pd.DataFrame:
    """The average rank of every method and how far it is from the first one's, the best first; 1 is the best rank.

    A cell is a model, task, data, settings, metric and sparsity; values are means over seeds, and equal values share
    their mean rank. Cells are not independent: the tasks and metrics of one pruned model speak of the same masks. So
    methods are compared by permutation: where all are equal, their names can be exchanged within a block of cells, all
    cells of the block alike. Friedman's test and Nemenyi's critical difference (Demšar 2006, JMLR 7), which count every
    cell as independent, find differences that are none.

    Example:
        >>> ranks(df[df.metric.isin(["r_mean", "cider", "accuracy"])])

    Args:
        df: as `load_results` returns it; select the metrics that are of interest first.
        block: columns that tell apart what is independent; ("model",) where sparsities of a model are not, either.

    Returns:
        method, variant, rank, difference (to the first), p (the probability that, were all methods equal, the first and
        the last average rank lay at least so far apart: it holds for all pairs at once), cells, blocks. NaN as p of the
        first, and where there is one block alone.

    Raises:
        ValueError: fewer than two methods, or no cell that has all of them.
    """
    pruned = df.loc[df.method != DENSE]
    wide = pd.pivot_table(pruned, "value", CELL, ["method", "variant"], observed=True, sort=False)
    if wide.shape[1] < 2:
        raise ValueError(f"ranks are of at least two methods, got {wide.shape[1]}")
    whole = wide.dropna()
    if whole.empty:
        raise ValueError(
            f"no cell of {len(wide)} has all {wide.shape[1]} methods: choose among the methods or the cells"
        )
    number, blocks = pd.factorize(pd.MultiIndex.from_arrays([whole.index.get_level_values(name) for name in block]))
    own = whole.rank(axis=1, ascending=False).to_numpy(float)
    sums = np.zeros((len(blocks), own.shape[1]))
    np.add.at(sums, number, own)
    average = sums.sum(0) / len(own)
    order = np.argsort(average, kind="stable")
    differences = average[order] - average[order[0]]
    wider = _ranges(sums, len(own))
    p = [(1 + (wider >= difference - 1e-9).sum()) / (1 + len(wider)) for difference in differences]
    named = pd.DataFrame(list(whole.columns), columns=["method", "variant"]).iloc[order].reset_index(drop=True)
    return named.assign(
        rank=average[order],
        difference=differences,
        p=[np.nan, *p[1:]] if len(blocks) > 1 else np.nan,
        cells=len(own),
        blocks=len(blocks),
    )


def _ranges(sums: np.ndarray, cells: int) -> np.ndarray:
    """(PERMUTATIONS,): the range of the average ranks after each permutation of the methods within the blocks.

    Args:
        sums: (blocks, methods), the sums of the ranks over the cells of each block.
        cells: number of all cells.
    """
    draw, found = np.random.default_rng(0), np.empty(PERMUTATIONS)
    for number in range(PERMUTATIONS):
        average = draw.permuted(sums, axis=1).sum(0) / cells
        found[number] = average.max() - average.min()
    return found
