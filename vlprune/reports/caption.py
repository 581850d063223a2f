"""What a table was made on and with, in the sentences below it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pandas as pd

from vlprune.config import DENSE
from vlprune.store.record import Record

LEVEL = 0.05  # of the tests behind the marks


def described(records: Iterable[Record]) -> list[str]:
    """Sentences on data, samples and fine-tuning of each task, on calibration and seeds.

    Example:
        ["retrieval: 300 images of scenes (test), after 25 steps of 32 samples.", "1 seed."]
    """
    records = list(records)
    said = []
    for task in dict.fromkeys(record.config.task.name for record in records):
        own = [record for record in records if record.config.task.name == task]
        said.append(f"{task}: {_either(map(_data, own))}, {_either(map(_training, own))}.")
    pruned = [record.config.calibration for record in records if record.config.pruning.method != DENSE]
    if pruned:
        drawn = _either(f"{own.n_batches} batches of {own.batch_size} pairs of {_short(own.data)}" for own in pruned)
        said.append(f"Calibration of the methods that need it: {drawn}.")
    seeds = len({record.config.seed for record in records})
    return [*said, f"{seeds} seed{'' if seeds == 1 else 's'}."]


def explained(long: pd.DataFrame, marked: Collection[tuple]) -> str:
    """What bold means in the tables of a frame; "" where no methods compete."""
    if long.loc[long.method != DENSE, "label"].nunique() < 2:
        return ""
    if not marked:
        return (
            "Nothing is bold: no method is above the floors, or one seed without stored pseudo-values of the images "
            "does not tell how far a difference would move."
        )
    seeds = "test images and seeds" if long.seed.nunique() > 1 else "test images, of one seed"
    return (
        "Bold: above the floors and not distinguishable from the highest mean of the column, in paired tests over "
        f"{seeds} (Holm, {100 * LEVEL:g} %)."
    )


def _data(record: Record) -> str:
    task, images, samples = record.config.task, *(record.evaluated.get(name) for name in ("images", "samples"))
    name = f"{_short(task.data)} ({task.test})"
    if images is None:
        return name
    return (
        f"{images:,} images of {name}" if samples == images else f"{samples:,} samples on {images:,} images of {name}"
    )


def _training(record: Record) -> str:
    own = record.config.finetuning
    if own.steps == 0:
        return "without fine-tuning"
    long = f"{own.steps} steps" if own.steps is not None else f"{own.epochs} epochs"
    return f"after {long} of {own.batch_size} samples"


def _short(data: str) -> str:
    """The name of data: the last part of a path."""
    return data.rstrip("/").rpartition("/")[2] or data


def _either(texts: Iterable[str]) -> str:
    """The different texts, joined by "or"."""
    return " or ".join(dict.fromkeys(texts))
