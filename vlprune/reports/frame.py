"""All records in one long DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlprune.config import DENSE, PARTS, to_plain
from vlprune.reports.variants import NO_DEFAULTS, Defaults, label, labels, variant
from vlprune.store.record import Record

# The columns of each row but for those of settings, modalities, floors, stages and packages.
COLUMNS = (
    *("model", "method", "variant", "sparsity", "seed", "task", "metric", "value", "dense", "retention", "floor"),
    *("measured_sparsity", "seconds", "peak_memory", "data", "host", "device", "commit", "finished"),
    *("settings", "key", "label"),
)
RESULTS = "_results.csv"  # how the name of the file ends that the rows of a table are stored in
PER_IMAGE = "_images.parquet"  # and the pseudo-values of its runs
FLOOR_COLUMNS = ("model", "floor", "variant", "seed", "task", "metric", "value", "label")
RUN = ["model", "method", "variant", "sparsity", "seed", "task", "metric"]
# Settings that have a column under another name.
NAMED = {"model.name", "pruning.method", "pruning.sparsity", "task.name", "task.data"}


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
    records = list(records)
    runs = _runs(records, variants, defaults)
    metrics = [(n, metric, value) for n, record in enumerate(records) for metric, value in record.metrics.items()]
    dense: dict[Any, Mapping[str, float]] = {}
    for record in records:
        if record.config.pruning.method == DENSE:
            dense.setdefault(_dense_place(record), record.metrics)
    whole = [dense.get(_dense_place(record), {}) for record in records]
    names = dict.fromkeys(name for record in records for name in record.floors)
    own = {
        "metric": categories([metric for _, metric, _ in metrics]),
        "value": np.array([value for *_, value in metrics], float),
        "dense": np.array([whole[n].get(metric, np.nan) for n, metric, _ in metrics], float),
        **{
            f"floor.{name}": np.array([records[n].floors.get(name, {}).get(m, np.nan) for n, m, _ in metrics], float)
            for name in names
        },
    }
    long = runs.take([n for n, *_ in metrics]).reset_index(drop=True).assign(**own)
    long["retention"] = (long.value / long.dense).where(long.dense != 0)
    floors = [f"floor.{name}" for name in names]
    long["floor"] = long[floors].max(axis=1) if floors else np.nan
    first, last = COLUMNS[: COLUMNS.index("floor") + 1], [c for c in runs if c not in COLUMNS[: COLUMNS.index("value")]]
    return long.reindex(columns=[*first, *floors, *last])


def _runs(records: list[Record], variants: Mapping[str, str] | None, defaults: Defaults) -> pd.DataFrame:
    """What all rows of a run have in common, a row for each."""
    columns: dict[str, Any] = {
        "model": categories([record.config.model.name for record in records]),
        "method": categories([record.config.pruning.method for record in records]),
        "variant": categories([variant_of(record, variants) for record in records]),
        "sparsity": np.array([record.config.pruning.sparsity for record in records], float),
        "seed": np.array([record.config.seed for record in records], np.int64),
        "task": categories([record.config.task.name for record in records]),
        **_settings(records),
        "measured_sparsity": np.array([record.sparsity for record in records], float),
        **_numbers("measured_sparsity", [record.modality_sparsity for record in records]),
        "seconds": np.array([sum(record.seconds.values()) for record in records], float),
        **_numbers("seconds", [record.seconds for record in records]),
        "peak_memory": np.array([record.peak_memory for record in records], np.int64),
        "data": categories([record.config.task.data for record in records]),
    }
    tuned, last = ([record.origins.get(kind, {}) for record in records] for kind in ("tuned", "record"))
    columns |= {name: categories([origin.get(name) for origin in tuned]) for name in ("host", "device")}
    columns["commit"] = categories([origin.get("commit") for origin in last])
    columns["finished"] = pd.to_datetime([origin.get("finished") for origin in last], utc=True)
    versions = [origin.get("versions", {}) for origin in last]
    for name in dict.fromkeys(name for own in versions for name in own):
        columns[f"versions.{name}"] = categories([own.get(name) for own in versions])
    columns["settings"] = categories([record.stages["settings"] for record in records])
    columns["key"] = categories([record.key for record in records])
    columns["label"] = categories(label_of(columns["method"], columns["variant"], defaults))
    return pd.DataFrame(columns)


def _settings(records: list[Record]) -> dict[str, Any]:
    """{dotted name: values} of every setting that is not the same for all records and has no column of another name."""
    columns = {}
    for part in PARTS:
        # Many records hold one and the same part.
        parts = {id(own): own for own in (getattr(record.config, part) for record in records)}
        values = {number: _flat(to_plain(own), f"{part}.") for number, own in parts.items()}
        own = [id(getattr(record.config, part)) for record in records]
        for name in dict.fromkeys(name for flat in values.values() for name in flat):
            if name not in NAMED and len({repr(flat.get(name)) for flat in values.values()}) > 1:
                columns[name] = column([values[number].get(name) for number in own])
    return columns


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """{dotted name: value} of nested settings."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def column(values: list[Any]) -> Any:
    """Settings as numbers, where all are, or as texts in the order in which they come."""
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        return np.array([np.nan if value is None else value for value in values], float)
    return categories([None if value is None else str(value) for value in values])


def categories(values: Sequence[Any]) -> pd.Categorical:
    """Values as categories in the order in which they come; None is missing."""
    return pd.Categorical(values, categories=[value for value in dict.fromkeys(values) if value is not None])


def _numbers(name: str, values: list[dict[str, float]]) -> dict[str, Any]:
    """{"name.key": values} of all keys."""
    keys = dict.fromkeys(key for own in values for key in own)
    return {f"{name}.{key}": np.array([own.get(key, np.nan) for own in values], float) for key in keys}


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
    long["label"] = pd.Series(label_of(long.floor, long.variant), index=long.index, dtype=str)
    return long


def _dense_place(record: Record) -> tuple[str, str, int, str]:
    config = record.config
    return config.model.name, config.task.name, config.seed, record.stages["settings"]


def label_of(methods: Iterable[str], variants: Iterable[str], defaults: Defaults = NO_DEFAULTS) -> list[str]:
    """What a table with these methods and variants calls each of them."""
    pairs = list(zip(methods, variants, strict=True))
    names = labels(dict.fromkeys(pairs), defaults)
    return [names[pair] for pair in pairs]


def gathered(long: pd.DataFrame) -> pd.DataFrame:
    """The frame with the variants of a method below each other, methods in the order of their first rows."""
    order = {method: i for i, method in enumerate(long.method.unique())}
    return long.sort_values("method", key=lambda methods: methods.map(order).astype(int), kind="stable")


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
