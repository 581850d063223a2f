"""Record: what one finished run measured, as one JSON in the directory of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlprune.config import RunConfig
from vlprune.schema import build
from vlprune.store.atomic import atomic, write_text
from vlprune.store.keys import Contents

logger = logging.getLogger(__name__)

RECORD, PREDICTIONS, ERROR, LOG = "record.json", "predictions.jsonl", "error.txt", "log.txt"
PACKAGES = ("vlprune", "torch", "transformers")


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        key: digest of all that changes the numbers; the name of the run's directory.
        config: what was run.
        metrics: {metric: value}, in the order of the task.
        floors: {floor name: {metric: value}}, what a model that learned nothing gets.
        sparsity: measured pruned fraction of the prunable entries, in [0, 1).
        layer_sparsity: {layer name: measured pruned fraction}.
        seconds: {stage: seconds}; "prune" includes waiting for another worker that makes the same statistics or masks.
        peak_memory: bytes.
        versions: {package: version}.
        contents: the weights, data and code behind the names in config.
    """

    key: str
    config: RunConfig
    metrics: dict[str, float]
    floors: dict[str, dict[str, float]]
    sparsity: float
    layer_sparsity: dict[str, float]
    seconds: dict[str, float]
    peak_memory: int
    versions: dict[str, str]
    contents: Contents


def versions() -> dict[str, str]:
    """{package: version, or "not installed"} of the packages that change a run's numbers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from the source tree
            found[package] = "not installed"
    return found


def run_directory(results: Path, key: str) -> Path:
    """Where a run keeps its record, predictions, error and log."""
    return results / "runs" / key


def write_record(directory: Path, record: Record, predictions: Iterable[Mapping[str, Any]]) -> None:
    """Stores a finished run: predictions first, record last, both atomically; the error of an earlier attempt goes.

    Raises:
        OSError: the disk is full or read-only; no record is left.
        ValueError: a metric or a prediction is not a finite number or not JSON.
    """
    try:
        text = json.dumps(asdict(record), indent=1, allow_nan=False)
        lines = [json.dumps(prediction, allow_nan=False, ensure_ascii=False) + "\n" for prediction in predictions]
    except ValueError as error:
        bad = {name: value for name, value in record.metrics.items() if not abs(value) < float("inf")}
        raise ValueError(f"the run gave numbers that are not finite: {bad or error}") from error
    with atomic(directory / PREDICTIONS) as half, half.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    write_text(directory / RECORD, text + "\n")
    (directory / ERROR).unlink(missing_ok=True)


def write_error(directory: Path, error: str) -> Path:
    """Stores why a run failed, and returns the file."""
    path = directory / ERROR
    write_text(path, error.rstrip() + "\n")
    return path


def read_record(directory: Path) -> Record | None:
    """The record of a run's directory, or None where the run is not done; a record that cannot be read is no record."""
    path = directory / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["config"] = build(RunConfig, values["config"], "config")
        values["contents"] = Contents(**values["contents"])
        record = Record(**values)
        if record.key != directory.name:
            raise ValueError(f"it is the record of run {record.key}")
        # Numbers that are no numbers would only fail later, in a table.
        dict.fromkeys(record.metrics)
        sum([record.sparsity, *record.metrics.values(), *record.seconds.values()])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read and counts as not done: %s", path, error)
        return None
    return record


def load_records(results: Path) -> list[Record]:
    """All finished runs of a results directory, in the order of their keys.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"there is no results directory {str(results)!r}")
    found = (read_record(path.parent) for path in sorted((results / "runs").glob(f"*/{RECORD}")))
    return [record for record in found if record is not None]
