"""Overlaps: how far the masks of methods, variants and seeds agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, product
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlprune import escapes
from vlprune.config import DENSE
from vlprune.reports.frame import rows, variant_of
from vlprune.reports.tables import percent
from vlprune.reports.variants import NO_DEFAULTS, Defaults, labels, settings
from vlprune.store.record import Record

COLUMNS = (
    *("model", "sparsity", "modality", "method_a", "variant_a", "seed_a", "method_b", "variant_b", "seed_b"),
    *("iou", "chance"),
)
Maker = tuple[str, str, int]


def overlap_frame(records: Iterable[Record], cache: Path, variants: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row per model, sparsity, modality and pair of masks: the intersection over union of the kept entries.

    Columns: model, sparsity, modality ("all" for all layers), method_a, variant_a, seed_a, method_b, variant_b, seed_b,
    iou, chance (what two random masks of that sparsity have). Each pair is there once, and masks that several runs
    share (other tasks, other fine-tuning) count once, under the settings that the variants of these runs have in
    common. At most two masks are in memory.

    Args:
        records: finished runs of a table.
        cache: cache directory of its sweep; runs whose masks are not there are left out.
        variants: {record key: variant}, as `frame` takes them.

    Raises:
        ValueError: a bundle of masks is damaged.
    """
    found = []
    for (model, sparsity), paths in _bundles(records, cache, variants).items():
        for a, b, modality, iou in _pairs(paths):
            found.append((model, sparsity, modality, *a, *b, iou, chance(sparsity)))
    return pd.DataFrame(found, columns=list(COLUMNS))


def _bundles(
    records: Iterable[Record], cache: Path, variants: Mapping[str, str] | None
) -> dict[tuple[str, float], dict[Maker, Path]]:
    """{(model, sparsity): {(method, variant, seed): file of masks}}."""
    shared: dict[Path, list[Record]] = {}
    for record in records:
        if record.config.pruning.method != DENSE:
            path = cache / "masks" / f"{record.stages['masks']}.safetensors"
            shared.setdefault(path, []).append(record)
    found: dict[tuple[str, float], dict[Maker, Path]] = {}
    for path, makers in shared.items():
        if path.is_file():
            config = makers[0].config
            own = [settings(variant_of(record, variants)).items() for record in makers]
            common = " ".join(f"{k}={v}" for k, v in own[0] if all((k, v) in other for other in own))
            maker = (config.pruning.method, common, config.seed)
            found.setdefault((config.model.name, config.pruning.sparsity), {})[maker] = path
    return found


def chance(sparsity: float) -> float:
    """The intersection over union of two random masks: d² / (2d - d²), with density d = 1 - sparsity."""
    return (1 - sparsity) / (1 + sparsity)


def _pairs(paths: dict[Maker, Path]) -> Iterator[tuple[Maker, Maker, str, float]]:
    # Whoever reads tables without masks needs no torch.
    from vlprune.masks import overlap
    from vlprune.store.masks import load_masks, load_provenance

    makers = list(paths)
    for i, a in enumerate(makers[:-1]):
        masks = load_masks(paths[a])
        # A bundle may not say which modality a layer is of.
        modality = json.loads(load_provenance(paths[a]).get("modality", "{}"))
        for b in makers[i + 1 :]:
            values = overlap(masks, load_masks(paths[b]), modality)
            for name in ("all", *dict.fromkeys(modality.values())):
                yield a, b, name, values[name]


def middle(sparsities: Iterable[float]) -> float:
    """The sparsity of a table whose overlaps are drawn: the middle one, the lower of two."""
    ordered = sorted(set(sparsities))
    return ordered[(len(ordered) - 1) // 2]


def heat_map(overlaps: pd.DataFrame, sparsity: float, defaults: Defaults = NO_DEFAULTS) -> Figure:
    """A panel per model: the overlap over all layers of every method with every other at a sparsity.

    Two methods are compared under the same seed, and their seeds averaged. The diagonal is the mean overlap of a method
    between different seeds, empty where there is one.

    Args:
        overlaps: as `overlap_frame` returns it.
        sparsity: one of the frame's.
        defaults: {method: {option: default as text}}, as `labels` takes them.

    Raises:
        ValueError: there are no overlaps at that sparsity.
    """
    drawn = rows(overlaps, sparsity=sparsity, modality="all")
    if drawn.empty:
        raise ValueError(f"no overlaps at sparsity {sparsity:g}; there are: {sorted(set(overlaps.sparsity))}")
    makers = (zip(overlaps[f"method_{x}"], overlaps[f"variant_{x}"], strict=True) for x in ("a", "b"))
    names = labels(chain.from_iterable(makers), defaults)
    models = list(drawn.model.unique())
    squares = [_square(rows(drawn, model=model), names) for model in models]
    n = max(len(square) for square in squares)
    margin = 0.08 * max(len(name) for name in names.values())
    size = (0.56 * n * len(models) + margin + 1.8, 0.56 * n + 0.65 * margin + 1.2)
    chart = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(chart)
    axes = chart.subplots(1, len(models), squeeze=False)[0]
    for ax, model, square in zip(axes, models, squares, strict=True):
        ax.imshow(square, vmin=0, vmax=1, cmap="Blues")
        ax.set_title(escapes.figure(model), fontsize=11)
        ticks = [escapes.figure(name) for name in square.index]
        ax.set_xticks(range(len(ticks)), ticks, rotation=40, ha="right", rotation_mode="anchor")
        shared = ax is not axes[0] and list(square.index) == list(squares[0].index)
        ax.set_yticks([] if shared else range(len(ticks)), [] if shared else ticks)
        ax.tick_params(length=0, labelsize=10)
        ax.spines[:].set_visible(False)
        for i, j in product(range(len(square)), repeat=2):
            value = square.iat[i, j]
            if pd.notna(value):
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    bar = chart.colorbar(axes[0].images[0], ax=axes.tolist(), shrink=0.8, label="intersection over union")
    bar.outline.set_visible(False)
    chart.suptitle(f"overlap of the masks at {percent(sparsity)} sparsity", fontsize=12, fontweight="bold")
    notes = [f"two random masks overlap by {chance(sparsity):.2f}"]
    if (drawn.seed_a != drawn.seed_b).any():
        notes.append("on the diagonal: one method under different seeds")
    chart.supxlabel("; ".join(notes), fontsize=10)
    return chart


def _square(own: pd.DataFrame, names: dict[tuple[str, str], str]) -> pd.DataFrame:
    """Mean overlaps of a model, a row and a column per label; NaN where there are none."""
    a = [names[pair] for pair in zip(own.method_a, own.variant_a, strict=True)]
    b = [names[pair] for pair in zip(own.method_b, own.variant_b, strict=True)]
    named = own.assign(a=a, b=b)
    # Pairs of one method are of different seeds, pairs of two are compared under one.
    named = named.loc[(named.a == named.b) | (named.seed_a == named.seed_b)]
    both = pd.concat([named, named.rename(columns={"a": "b", "b": "a"})])
    order = [name for name in names.values() if name in {*a, *b}]
    return both.groupby(["a", "b"]).iou.mean().unstack().reindex(index=order, columns=order)
