"""All records in one long DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from vlprune.config import DENSE, variant
from vlprune.reports.variants import label, labels
from vlprune.store.keys import digest
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
)
FLOOR_COLUMNS = ("model", "seed", "task", "floor", "metric", "value")
RUN = ["model", "method", "variant", "sparsity", "seed", "task", "metric"]


def load_results(path: str | Path) -> pd.DataFrame:
    """One row per finished run and metric of a results directory.

    Columns: model, method ("dense" for the whole model), variant (the settings of calibration and pruning that are not
    the defaults, as in "alignment=4 lam=0.1"), sparsity (asked, in [0, 1)), seed, task, metric, value, dense (the value
    of the dense model under the same settings, NaN where there is none), retention (value / dense), measured_sparsity,
    seconds (all stages), peak_memory (bytes), data, settings (digest of weights, fine-tuning and
    task: only rows with equal settings are comparable), key (directory of the run).

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    return frame(load_records(Path(path)))


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """The records as `load_results` returns them, in the given order."""
    values = [
        {
            "model": record.config.model,
            "method": record.config.pruning.method,
            "variant": variant(record.config),
            "sparsity": record.config.pruning.sparsity,
            "seed": record.config.seed,
            "task": record.config.task.name,
            "metric": metric,
            "value": value,
            "measured_sparsity": record.sparsity,
            "seconds": sum(record.seconds.values()),
            "peak_memory": record.peak_memory,
            "data": record.config.task.data,
            "settings": _settings(record),
            "key": record.key,
        }
        for record in records
        for metric, value in record.metrics.items()
    ]
    long = pd.DataFrame(values, columns=[c for c in COLUMNS if c not in ("dense", "retention")])
    same = ["model", "seed", "task", "metric", "settings"]
    dense = long.loc[long.method == DENSE, [*same, "value"]].rename(columns={"value": "dense"})
    long = long.merge(dense.drop_duplicates(same), on=same, how="left")
    long["retention"] = (long.value / long.dense).where(long.dense != 0)
    return long.reindex(columns=list(COLUMNS))


def _settings(record: Record) -> str:
    # What a run shares with the dense run that it is compared with; data counts by its content.
    config, contents = record.config, record.contents
    task = replace(config.task, data=contents.task)
    return digest(contents.model, contents.model_code, config.finetuning, task, contents.task_code)


def floor_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per run, floor and metric: model, seed, task, floor, metric, value."""
    values = [
        (record.config.model, record.config.seed, record.config.task.name, floor, metric, value)
        for record in records
        for floor, metrics in record.floors.items()
        for metric, value in metrics.items()
    ]
    return pd.DataFrame(values, columns=list(FLOOR_COLUMNS))


def named(long: pd.DataFrame) -> pd.DataFrame:
    """The frame with a column `label`: how a table calls the variant of a method; variants stand below each other."""
    names = labels(zip(long.method, long.variant, strict=True))
    own = [names[pair] for pair in zip(long.method, long.variant, strict=True)]
    order = {method: i for i, method in enumerate(long.method.unique())}
    return long.assign(label=pd.Series(own, index=long.index, dtype=str)).sort_values(
        "method", key=lambda methods: methods.map(order), kind="stable"
    )


def rows(long: pd.DataFrame, **equal: object) -> pd.DataFrame:
    """The rows whose columns have the given values."""
    keep = pd.Series(True, index=long.index)
    for column, value in equal.items():
        keep &= long[column] == value
    return long.loc[keep]


def check_comparable(long: pd.DataFrame, apart: Sequence[str] = ()) -> None:
    """Refuses a frame with two runs in one place of a table.

    Args:
        long: of `frame`.
        apart: more columns that tell places apart.

    Raises:
        ValueError: two rows of equal model, method, variant, sparsity, seed, task, metric and values apart.
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
