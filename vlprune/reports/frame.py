"""All records in one long DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vlprune.config import DENSE
from vlprune.reports.variants import NO_DEFAULTS, Defaults, label, labels, variant
from vlprune.store.record import Record, load_records

COLUMNS = (
    "model",
    "method",
    "variant",
    "sparsity",
    "seed",
    "task",
    "metric",
    "value",
    "dense",
    "retention",
    "measured_sparsity",
    "seconds",
    "peak_memory",
    "data",
    "settings",
    "key",
    "label",
)
FLOOR_COLUMNS = ("model", "floor", "variant", "seed", "task", "metric", "value", "label")
RUN = ["model", "method", "variant", "sparsity", "seed", "task", "metric"]


def load_results(path: str | Path) -> pd.DataFrame:
    """One row per finished run and metric of a results directory.

    Columns: model, method ("dense" for the whole model), variant (the settings of calibration and pruning that differ
    from their defaults, as in "alignment=4 lam=0.1"), sparsity (asked for, in [0, 1)), seed, task, metric, value, dense
    (the value of the dense model under the same settings, NaN where there is none), retention (value / dense),
    measured_sparsity, seconds (all stages), peak_memory (bytes), data, settings (digest of weights, fine-tuning and
    task: only rows with equal settings are comparable), key (name of the run's directory), label (how a table of these
    rows calls the method and its variant).

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    return frame(load_records(Path(path)))


def frame(
    records: Iterable[Record], variants: Mapping[str, str] | None = None, defaults: Defaults = NO_DEFAULTS
) -> pd.DataFrame:
    """The records as `load_results` returns them, in the given order.

    Args:
        records: finished runs.
        variants: {record key: variant}, as a table's manifest has them; without it, and for records that are not there,
            the variant is what differs from the defaults. The dense model may have variants as well.
        defaults: {method: {option: default as text}}, which labels show beside variants that differ from them.
    """
    values = [
        {**run, "metric": metric, "value": value}
        for record in records
        for run in [_run(record, variants)]
        for metric, value in record.metrics.items()
    ]
    long = pd.DataFrame(values, columns=[c for c in COLUMNS if c not in ("dense", "retention", "label")])
    same = ["model", "seed", "task", "metric", "settings"]
    dense = long.loc[long.method == DENSE, [*same, "value"]].rename(columns={"value": "dense"})
    long = long.merge(dense.drop_duplicates(same), on=same, how="left")
    long["retention"] = (long.value / long.dense).where(long.dense != 0)
    long["label"] = _label(long.method, long.variant, defaults)
    return long.reindex(columns=list(COLUMNS))


def _run(record: Record, variants: Mapping[str, str] | None) -> dict[str, Any]:
    """What the rows of a run have in common."""
    return {
        "model": record.config.model.name,
        "method": record.config.pruning.method,
        "variant": variant_of(record, variants),
        "sparsity": record.config.pruning.sparsity,
        "seed": record.config.seed,
        "task": record.config.task.name,
        "measured_sparsity": record.sparsity,
        "seconds": sum(record.seconds.values()),
        "peak_memory": record.peak_memory,
        "data": record.config.task.data,
        "settings": record.stages["settings"],
        "key": record.key,
    }


def variant_of(record: Record, variants: Mapping[str, str] | None) -> str:
    """The variant of a record: that of the manifest, or what differs from the defaults where it has none."""
    given = None if variants is None else variants.get(record.key)
    return variant(record.config) if given is None else given


def floor_frame(records: Iterable[Record], variants: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row per run, floor and metric: what a model that learned nothing gets.

    Columns: model, floor, variant (that of the dense run with equal settings if the floor is another under another
    variant of the dense model, else ""), seed, task, metric, value, label (how a table calls the floor).

    Args:
        records: finished runs.
        variants: as `frame` takes them.
    """
    records = list(records)
    dense = {_dense_place(r): variant_of(r, variants) for r in records if r.config.pruning.method == DENSE}
    values = [
        (
            *(record.config.model.name, floor, dense.get(_dense_place(record), "")),
            *(record.config.seed, record.config.task.name, metric, value),
        )
        for record in records
        for floor, metrics in record.floors.items()
        for metric, value in metrics.items()
    ]
    long = pd.DataFrame(values, columns=list(FLOOR_COLUMNS[:-1]))
    place = ["model", "floor", "task"]
    counts = long.groupby([*place, "seed", "metric"]).value.transform("nunique")
    varies = counts.groupby([long[column] for column in place]).transform("max") > 1
    long["variant"] = long.variant.where(varies, "")
    long["label"] = _label(long.floor, long.variant)
    return long


def _dense_place(record: Record) -> tuple[str, str, int, str]:
    config = record.config
    return config.model.name, config.task.name, config.seed, record.stages["settings"]


def _label(methods: pd.Series, variants: pd.Series, defaults: Defaults = NO_DEFAULTS) -> pd.Series:
    pairs = list(zip(methods, variants, strict=True))
    names = labels(pairs, defaults)
    return pd.Series([names[pair] for pair in pairs], index=methods.index, dtype=str)


def gathered(long: pd.DataFrame) -> pd.DataFrame:
    """The frame with the variants of a method below each other, methods in the order of their first rows."""
    order = {method: i for i, method in enumerate(long.method.unique())}
    return long.sort_values("method", key=lambda methods: methods.map(order), kind="stable")


def rows(long: pd.DataFrame, **equal: object) -> pd.DataFrame:
    """The rows whose columns have the given values."""
    keep = pd.Series(True, index=long.index)
    for column, value in equal.items():
        keep &= long[column] == value
    return long.loc[keep]


def check_comparable(long: pd.DataFrame, apart: Sequence[str] = ()) -> None:
    """Refuses a frame with two runs in one place of a table.

    Args:
        long: as `frame` returns it.
        apart: further columns whose values tell places apart, such as "data".

    Raises:
        ValueError: two rows have equal model, method, variant, sparsity, seed, task and metric, and equal values in the
            columns of `apart`.
    """
    twice = long.loc[long.duplicated([*RUN, *apart], keep=False)]
    if len(twice):
        first = twice.iloc[0]
        same = rows(twice, **{column: first[column] for column in (*RUN, *apart)})
        method = label(first.method, first.variant)
        raise ValueError(
            f"several runs of {first.model} {method} at sparsity {first.sparsity:g} on {first.task}, "
            f"seed {first.seed}, with settings {' and '.join(dict.fromkeys(same.settings))} "
            f"and keys {' and '.join(same.key)}: keep the rows of one"
        )
