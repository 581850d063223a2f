"""Figures: a metric against the sparsity."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlprune import escapes
from vlprune.config import DENSE
from vlprune.reports.frame import check_comparable, gathered, rows
from vlprune.reports.tables import metric_axis
from vlprune.store.atomic import atomic

# Okabe and Ito's palette for all kinds of colour vision; markers and dashes tell the lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.")
INK = "#444444"


def figure(long: pd.DataFrame, floors: pd.DataFrame, task: str, metric: str) -> Figure:
    """A panel per model: the metric of a task against the sparsity in percent, a line per method and variant.

    Points are means over seeds, bands go from the lowest to the highest seed. The dense model and the floors (what a
    model that learned nothing gets) are horizontal lines, one per variant.

    Args:
        long: as `frame` returns it.
        floors: as `floor_frame` returns it.
        task: name of the task to draw.
        metric: name of the task's metric to draw.

    Raises:
        ValueError: two runs in one place, or nothing to draw.
    """
    drawn = rows(gathered(long), task=task, metric=metric)
    if drawn.empty:
        raise ValueError(
            f"there is no {metric!r} of task {task!r} to draw; there are: {sorted(set(rows(long, task=task).metric))}"
        )
    check_comparable(drawn)
    models = list(drawn.model.unique())
    methods = list(drawn.loc[drawn.method != DENSE].label.unique())
    whole = list(rows(drawn, method=DENSE).label.unique())
    chart = Figure(figsize=(3.7 * len(models) + 1.9, 3.7), dpi=150, layout="constrained")
    FigureCanvasAgg(chart)
    axes = chart.subplots(1, len(models), sharey=True, squeeze=False)[0]
    handles = {}
    for ax, model in zip(axes, models, strict=True):
        own = rows(drawn, model=model)
        for i, method in enumerate(methods):
            seeds = rows(own, label=method).groupby("sparsity").value
            x = 100 * seeds.mean().index.to_numpy()
            style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": DASHES[i // 8 % 3]}
            (handles[method],) = ax.plot(x, seeds.mean(), **style, linewidth=1.8, markersize=6, clip_on=False, zorder=3)
            if own.seed.nunique() > 1:
                ax.fill_between(x, seeds.min(), seeds.max(), color=style["color"], alpha=0.15, linewidth=0)
        for i, dense in enumerate(whole):
            values = rows(own, label=dense).value
            dashes = (0, (3.7, 1.6, *(1, 1.6) * i))
            if len(values):
                handles[dense] = ax.axhline(values.mean(), color=INK, linestyle=dashes, linewidth=1.2)
        lowest = rows(floors, model=model, task=task, metric=metric)
        for i, (floor, values) in enumerate(lowest.groupby("label", sort=False).value):
            dots = (0, (1, 1.5 + 1.5 * i))
            handles[f"floor: {floor}"] = ax.axhline(values.mean(), color=INK, linestyle=dots, linewidth=1.2)
        _dress(ax, model, sorted(100 * own.loc[own.method != DENSE, "sparsity"].unique()))
    axes[0].set_ylabel(escapes.figure(metric_axis(metric)), fontsize=11)
    axes[0].set_ylim(bottom=0)
    chart.suptitle(escapes.figure(task), fontsize=12, fontweight="bold")
    order = [*whole, *methods, *(name for name in handles if name.startswith("floor: "))]
    shown = [name for name in order if name in handles]
    chart.legend(
        [handles[name] for name in shown],
        [escapes.figure(name) for name in shown],
        loc="outside right center",
        frameon=False,
        fontsize=10,
    )
    return chart


def _dress(ax, title: str, ticks: list[float]) -> None:
    ax.set_title(escapes.figure(title), fontsize=11)
    ax.set_xlabel("sparsity (% of prunable weights)", fontsize=11)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=10)


def save(chart: Figure, path: Path) -> None:
    """Writes a figure as PNG, in full or not at all."""
    with atomic(path) as half:
        chart.savefig(half, format="png")
