"""Pseudo-values of a run: what each image of its test set has to do with its metrics, beside its record."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from vlprune.store.artifacts import Note, written
from vlprune.store.record import RECORD, run_directory

SUFFIX = ".images.csv"


def per_image_path(results: Path, key: str) -> Path:
    """Where the pseudo-values of a run are: a row for each image, with its image_id and a column for each metric."""
    return (run_directory(results, key) / RECORD).with_suffix(SUFFIX)


def write_per_image(results: Path, key: str, values: Mapping[str, Mapping[str, float]]) -> None:
    """Stores the pseudo-values {metric: {image id: value}} of a run, all metrics of the same images."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image_id", *values])
    images = next(iter(values.values()), {})
    rows.writerows([image, *(f"{own[image]:.9g}" for own in values.values())] for image in images)
    with written(per_image_path(results, key), Note()) as half:
        half.write_text(text.getvalue(), encoding="utf-8")
