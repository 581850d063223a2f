"""Tables as papers print them: methods in rows, metrics in columns, grouped by sparsity."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from vlprune.config import DENSE, unknown
from vlprune.reports.frame import check_comparable, gathered, rows
from vlprune.reports.grid import MISSING, Grid, Line
from vlprune.store.record import headline

# {metric: (its name in print, its unit)}
METRICS = {
    "tr_r1": ("TR@1", "%"),
    "tr_r5": ("TR@5", "%"),
    "tr_r10": ("TR@10", "%"),
    "tr_mean": ("TR mean", "%"),
    "ir_r1": ("IR@1", "%"),
    "ir_r5": ("IR@5", "%"),
    "ir_r10": ("IR@10", "%"),
    "ir_mean": ("IR mean", "%"),
    "r_mean": ("R mean", "%"),
    "rsum": ("RSUM", "of 600 %"),
    "bleu1": ("BLEU-1", "×100"),
    "bleu2": ("BLEU-2", "×100"),
    "bleu3": ("BLEU-3", "×100"),
    "bleu4": ("BLEU-4", "×100"),
    "rougel": ("ROUGE-L", "×100"),
    "cider": ("CIDEr", "×100"),
    "meteor": ("METEOR", "×100"),
    "spice": ("SPICE", "×100"),
    "accuracy": ("VQA", "%"),
    "exact_match": ("VQA exact", "%"),
    "yes_no": ("yes/no", "%"),
    "number": ("number", "%"),
    "other": ("other", "%"),
    "normalized": ("VQA normalized", "%"),
}


def metric_name(metric: str) -> str:
    """The name of a metric in print: "TR@1" for "tr_r1"."""
    return METRICS.get(metric, (metric, ""))[0]


def metric_axis(metric: str) -> str:
    """The name of a metric on an axis, with its unit: "TR@1 (%)"."""
    name, unit = METRICS.get(metric, (metric, ""))
    return f"{name} ({unit})" if unit else name


def percent(sparsity: float) -> str:
    """A fraction as a percentage: "62.5 %" for 0.625."""
    return f"{100 * sparsity:g} %"


def shown_first(long: pd.DataFrame, headlines: Mapping[str, str]) -> dict[str, str]:
    """{task: the metric that tables show first} of the tasks of a frame, see `vlprune.store.record.headline`."""
    return {task: headline(headlines[task], rows(long, task=task).metric.unique()) for task in long.task.unique()}


def summary(
    long: pd.DataFrame, floors: pd.DataFrame, headlines: Mapping[str, str], marked: Collection[tuple] = ()
) -> list[Grid]:
    """One grid per model: the headline metric of every task, by sparsity.

    A row per variant of the dense model, a row per method and variant, and a row per floor. Cells are means over seeds,
    ± the standard deviation where there are several, and "(2 of 3)" where not all seeds of the grid are done.

    Args:
        long: as `frame` returns it.
        floors: as `floor_frame` returns it.
        headlines: {task: metric}.
        marked: (model, label, sparsity, task, metric) of the cells to mark, as `leaders` returns them.

    Raises:
        ValueError: two runs in one place.
    """
    check_comparable(long)
    long = gathered(long)
    values, lowest = _values(long), _floor_values(floors)
    grids = []
    for model in long.model.unique():
        own = rows(long, model=model)
        seeds = own.seed.nunique()
        tasks = list(shown_first(own, headlines).items())
        pruned = own.loc[own.method != DENSE]
        sparsities = sorted(pruned.sparsity.unique()) or [0.0]
        columns = [(sparsity, task, metric) for sparsity in sparsities for task, metric in tasks]
        methods = list(pruned.label.unique())
        measured = [(task, metric) for _, task, metric in columns]
        blocks = (
            _dense_lines(values, own, measured, seeds),
            tuple(
                _line(method, [(model, method, *column) for column in columns], values, seeds, marked)
                for method in methods
            ),
            _floor_lines(lowest, model, measured),
        )
        names = tuple(metric_name(metric) for _, metric in tasks)
        groups = tuple((percent(sparsity) if methods else "", names) for sparsity in sparsities)
        grids.append(Grid(f"{model}{_seeds(own)}", groups, tuple(block for block in blocks if block)))
    return grids


def details(long: pd.DataFrame, floors: pd.DataFrame, marked: Collection[tuple] = ()) -> list[Grid]:
    """One grid per model and task with all metrics; a block of rows per sparsity. Cells and marks as in `summary`.

    Args:
        long: as `frame` returns it.
        floors: as `floor_frame` returns it.
        marked: as `summary` takes it.

    Raises:
        ValueError: two runs in one place.
    """
    check_comparable(long)
    long = gathered(long)
    values, lowest = _values(long), _floor_values(floors)
    grids = []
    for model, task in long[["model", "task"]].drop_duplicates().itertuples(index=False):
        own = rows(long, model=model, task=task)
        metrics = list(own.metric.unique())
        measured = [(task, metric) for metric in metrics]
        seeds = own.seed.nunique()
        blocks = [_dense_lines(values, own, measured, seeds)]
        pruned = own.loc[own.method != DENSE]
        for sparsity in sorted(pruned.sparsity.unique()):
            methods = list(rows(pruned, sparsity=sparsity).label.unique())
            blocks.append(
                tuple(
                    replace(line, label=f"{method} {percent(sparsity)}")
                    for method in methods
                    for places in [[(model, method, sparsity, task, metric) for metric in metrics]]
                    for line in [_line(method, places, values, seeds, marked)]
                )
            )
        blocks.append(_floor_lines(lowest, model, measured))
        names = tuple(metric_name(metric) for metric in metrics)
        grids.append(Grid(f"{model}, {task}{_seeds(own)}", (("", names),), tuple(block for block in blocks if block)))
    return grids


def averages(long: pd.DataFrame) -> pd.DataFrame:
    """One row per model, method, variant, sparsity, task and metric.

    Columns: mean over seeds, std (NaN for one seed), seeds (their number), dense and retention (means over seeds).

    Args:
        long: as `frame` returns it.

    Raises:
        ValueError: two runs in one place.
    """
    check_comparable(long)
    place = ["model", "method", "variant", "sparsity", "task", "metric"]
    return (
        long.groupby(place, sort=False, observed=True)
        .agg(
            mean=("value", "mean"),
            std=("value", "std"),
            seeds=("seed", "nunique"),
            dense=("dense", "mean"),
            retention=("retention", "mean"),
        )
        .reset_index()
    )


def pivot(df: pd.DataFrame, values: str = "value") -> pd.DataFrame:
    """The layout of a paper's table: a row per model, method and variant, a column per sparsity, task and metric.

    Cells are means over seeds. The dense model stands in the columns of every sparsity, as papers print it.

    Example:
        >>> pivot(df[df.metric.isin(["r_mean", "cider", "accuracy"])]).round(1).to_latex()

    Args:
        df: as `load_results` returns it; select the metrics and data that are of interest first.
        values: the column whose means are shown, such as "retention".

    Raises:
        ValueError: two runs in one place, or no such column.
    """
    if values not in df:
        raise ValueError(unknown("column", values, map(str, df.columns)))
    check_comparable(df)
    pruned, dense = df.loc[df.method != DENSE], df.loc[df.method == DENSE]
    sparsities = sorted(pruned.sparsity.unique())
    everywhere = [dense.assign(sparsity=sparsity) for sparsity in sparsities] or [dense]
    whole = gathered(pd.concat([*everywhere, pruned], ignore_index=True))
    keys = ["model", "method", "variant", "sparsity", "task", "metric"]
    order = {key: {value: n for n, value in enumerate(dict.fromkeys(df[key]))} for key in keys if key != "sparsity"}
    order["sparsity"] = {sparsity: n for n, sparsity in enumerate([0.0, *sparsities])}
    long = whole.groupby(keys, observed=True, sort=False)[values].mean()
    assert isinstance(long, pd.Series)
    means = long.unstack(keys[3:])
    assert isinstance(means, pd.DataFrame)

    def sorted_by(axis: Iterable[Any], names: Sequence[str]) -> list[Any]:
        return sorted(axis, key=lambda place: [order[name][value] for name, value in zip(names, place, strict=True)])

    return means.loc[sorted_by(means.index, keys[:3]), sorted_by(means.columns, keys[3:])]


def _values(long: pd.DataFrame) -> dict[tuple, list[float]]:
    # {(model, label, sparsity, task, metric): one value per seed}
    found: dict[tuple, list[float]] = {}
    columns = [long[column] for column in ("model", "label", "sparsity", "task", "metric", "value")]
    for *place, value in zip(*columns, strict=True):
        found.setdefault(tuple(place), []).append(value)
    return found


def _floor_values(floors: pd.DataFrame) -> dict[tuple, dict[int, float]]:
    # {(model, label, task, metric): {seed: value}}; every run of a seed has the same floor.
    found: dict[tuple, dict[int, float]] = {}
    columns = [floors[column] for column in ("model", "label", "task", "metric", "seed", "value")]
    for *place, seed, value in zip(*columns, strict=True):
        found.setdefault(tuple(place), {})[seed] = value
    return found


def _dense_lines(
    values: Mapping[tuple, list[float]], own: pd.DataFrame, measured: Sequence[tuple[str, str]], seeds: int
) -> tuple[Line, ...]:
    # A dense model that has not run is a row of dashes.
    model, names = own.model.iloc[0], list(rows(own, method=DENSE).label.unique()) or [DENSE]
    return tuple(_line(name, [(model, name, 0.0, *column) for column in measured], values, seeds) for name in names)


def _floor_lines(
    lowest: Mapping[tuple, Mapping[int, float]], model: str, measured: Sequence[tuple[str, str]]
) -> tuple[Line, ...]:
    # The floors of all seeds of one place are mostly the same: their mean stands for them.
    values = {place: [fmean(own.values())] for place, own in lowest.items()}
    names = dict.fromkeys(floor for own, floor, *column in lowest if own == model and tuple(column) in measured)
    return tuple(_line(floor, [(model, floor, *column) for column in measured], values, 1) for floor in names)


def _text(values: Sequence[float], seeds: int) -> str:
    if not values:
        return MISSING
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}{f' ({len(values)} of {seeds})' if len(values) < seeds else ''}"


def _line(
    label: str,
    places: Sequence[tuple],
    values: Mapping[tuple, Sequence[float]],
    seeds: int,
    marked: Collection[tuple] = (),
) -> Line:
    texts = tuple(_text(values.get(place, ()), seeds) for place in places)
    return Line(label, texts, tuple(place in marked for place in places))


def _seeds(long: pd.DataFrame) -> str:
    n = long.seed.nunique()
    return f", mean ± standard deviation of {n} seeds" if n > 1 else ""
