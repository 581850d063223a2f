"""Average ranks, and the layout of a paper."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_reports import at_rates, record, runs

import vlprune as vp
from vlprune.reports import ranking
from vlprune.reports.frame import frame

METHODS = ("omp", "lamp", "snip", "multiflow")


def cells(draw, blocks, tasks, shared, noise, better=0.0):
    """Results of four methods in blocks of cells: what the cells of a block share, and what is each cell's own."""
    records = []
    for block in range(blocks):
        of_block = draw.normal(0, shared, len(METHODS))
        for task in tasks:
            for n, method in enumerate(METHODS):
                value = 50 + of_block[n] + draw.normal(0, noise) + better * (n == 2)
                records.append(record(f"m{block}", method, 0.5, task, value=value))
    return frame(records)


def test_ranks_by_hand():
    values = {"omp": (3.0, 1.0), "lamp": (2.0, 2.0), "snip": (1.0, 2.0)}
    records = [record("b", m, s, "vqa", value=v) for m, own in values.items() for s, v in zip((0.5, 0.75), own)]
    found = vp.ranks(frame(records))
    # Ranks of omp 1, 3, of lamp 2, 1.5, of snip 3, 1.5.
    assert list(zip(found.method, found["rank"])) == [("lamp", 1.75), ("omp", 2.0), ("snip", 2.25)]
    assert list(found.difference) == [0, 0.25, 0.5]
    assert (found.cells.unique().tolist(), found.blocks.unique().tolist()) == ([2], [2])
    assert np.isnan(found.p[0])


def test_ranks_are_of_means_over_seeds():
    records = [record("b", "omp", s, "vqa", seed, v) for s in (0.5, 0.75) for seed, v in enumerate((10.0, 90.0))]
    records += [record("b", "lamp", s, "vqa", seed, 60.0) for s in (0.5, 0.75) for seed in (0, 1)]
    assert list(vp.ranks(frame(records)).method) == ["lamp", "omp"]


def test_cells_of_a_block_do_not_count_as_independent():
    """Where nothing differs but by block, a difference is found in at most 5 % of the tables; Friedman's test errs."""
    draw, wrong, friedman, tables = np.random.default_rng(0), 0, 0, 120
    ranking.PERMUTATIONS, kept = 400, ranking.PERMUTATIONS
    try:
        for _ in range(tables):
            df = cells(draw, 6, ("retrieval", "captioning", "vqa"), shared=1.0, noise=0.2)
            wrong += vp.ranks(df).p.min() <= 0.05
            wide = df.pivot_table("value", ["model", "task"], "method", observed=True)
            friedman += stats.friedmanchisquare(*wide.to_numpy().T).pvalue <= 0.05
    finally:
        ranking.PERMUTATIONS = kept
    assert wrong <= stats.binom.ppf(0.999, tables, 0.05)
    assert friedman > 3 * stats.binom.ppf(0.999, tables, 0.05) / 2


def test_a_method_that_is_better_everywhere_is_found():
    df = cells(np.random.default_rng(1), 8, ("retrieval", "vqa"), shared=0.5, noise=0.5, better=5)
    found = vp.ranks(df)
    assert found.method[0] == "snip"
    assert found["rank"][0] == 1
    assert (found.p[1:] < 0.05).all()
    by_task = vp.ranks(df, block=("task",))
    assert by_task.blocks.unique().tolist() == [2]
    assert by_task.p.min() > 0.05
    assert vp.ranks(df[df.model == "m0"]).p.isna().all()


def test_ranks_need_two_methods_and_a_cell_with_all():
    with pytest.raises(ValueError, match="at least two methods, got 1"):
        vp.ranks(frame([record("b", "omp", 0.5, "vqa")]))
    with pytest.raises(ValueError, match="no cell of 2 has all 2 methods"):
        vp.ranks(frame([record("b", "omp", 0.5, "vqa"), record("b", "lamp", 0.75, "vqa")]))


def test_a_pivot_has_the_layout_of_a_paper():
    df = frame(runs(models=("tiny-xvlm", "tiny-blip"), seeds=(0, 1)))
    wide = vp.pivot(df[df.metric.isin(["tr_r1", "cider", "accuracy"])])
    assert list(wide.index[:4]) == [("tiny-xvlm", m, "") for m in ("dense", "random", "omp", "lamp")]
    assert list(wide.columns[:4]) == [
        (0.63, "retrieval", "tr_r1"),
        (0.63, "captioning", "cider"),
        (0.63, "vqa", "accuracy"),
        (0.75, "retrieval", "tr_r1"),
    ]
    own = df[(df.model == "tiny-blip") & (df.method == "omp") & (df.sparsity == 0.75) & (df.metric == "cider")]
    assert wide.loc[("tiny-blip", "omp", ""), (0.75, "captioning", "cider")] == pytest.approx(own.value.mean())
    dense = wide.loc[("tiny-blip", "dense", "")].unstack(0)
    assert (dense.nunique(axis=1) == 1).all()
    shares = vp.pivot(df, "retention").loc[("tiny-blip", "dense", "")]
    assert np.allclose(shares, 1)
    assert "tiny-blip" in wide.round(1).to_latex()


def test_a_pivot_of_variants_gaps_and_the_dense_model_alone():
    records, variants = at_rates({("dense", 1e-4): 80.0, ("omp", 1e-4): 60.0, ("omp", 1e-3): 40.0})
    wide = vp.pivot(frame(records, variants))
    assert list(wide.index) == [("b", "dense", "lr=0.0001"), ("b", "omp", "lr=0.0001"), ("b", "omp", "lr=0.001")]
    alone = vp.pivot(frame(records[:1], variants))
    assert alone.to_numpy().tolist() == [[80.0]]
    gap = [record("b", "omp", 0.5, "vqa"), record("b", "lamp", 0.75, "vqa")]
    assert vp.pivot(frame(gap)).isna().to_numpy().sum() == 2
    with pytest.raises(ValueError, match="unknown column 'x'"):
        vp.pivot(frame(gap), "x")
    with pytest.raises(ValueError, match="several runs"):
        vp.pivot(pd.concat([frame(gap), frame(gap)]))
