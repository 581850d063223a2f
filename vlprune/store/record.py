"""Record: what one finished run measured, as one JSON in the directory of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlprune.config import PARTS, RunConfig, build, to_plain
from vlprune.store.artifacts import content
from vlprune.store.atomic import write_text

logger = logging.getLogger(__name__)

RECORD, ERROR, LOG, LOSSES = "record.json", "error.txt", "log.txt", "losses.csv"


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        key: digest of all that changes the numbers; the name of the run's directory.
        config: the settings of the run.
        metrics: {metric: value}, in the order of the task; none where the test split has nothing to compare with.
        floors: {floor: {metric: value}}, what a model that learned nothing gets.
        sparsity: measured fraction of zeros among the prunable weights after fine-tuning, in [0, 1).
        modality_sparsity: {modality: measured fraction of zeros}.
        layers: {layer name: {"modality": its modality, "weights": their number, "zeros": how many of them are zero}}.
        seconds: {kind of stage: wall-clock seconds}; of stages that several runs share, the time they took once.
        peak_memory: bytes, the largest of all stages.
        left_out: {split: number of images left out because they could not be read}; empty where none were.
        origins: {kind of stage: when, where and with what it was made, as the fields of `store.origin.Origin`}; of
            stages of one kind (statistics), that of the last.
        stages: {kind of stage: key of its artifact}; "settings" is the key of everything but the pruning and the seed,
            which two runs have in common if they can be compared.
        evaluated: {"images": number of images of the test set, "samples": number of its pairs or questions}.
    """

    key: str
    config: RunConfig
    metrics: dict[str, float]
    floors: dict[str, dict[str, float]]
    sparsity: float
    modality_sparsity: dict[str, float]
    layers: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    peak_memory: int
    left_out: dict[str, int]
    origins: dict[str, dict[str, Any]]
    stages: dict[str, str]
    evaluated: dict[str, int] = field(default_factory=dict)


def headline(wanted: str, metrics: Iterable[str]) -> str:
    """The metric that tables show first: the wanted one, or where data do not allow that, the first of its metrics.

    Questions with one answer have an exact match and no VQA accuracy.
    """
    measured = list(metrics)
    return wanted if wanted in measured else measured[0]


def run_directory(results: Path, key: str) -> Path:
    """Where a run keeps its record, error and log."""
    return results / "runs" / key


def predictions_path(results: Path, record: Record) -> Path:
    """Where the predictions of a run are, as JSON lines."""
    return results / "predictions" / f"{record.stages['predictions']}.jsonl"


def record_text(record: Record) -> str:
    """The JSON of a record.

    Raises:
        ValueError: a metric is not a finite number.
    """
    try:
        return json.dumps({**asdict(record), "config": to_plain(record.config)}, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        bad = {name: value for name, value in record.metrics.items() if not abs(value) < float("inf")}
        raise ValueError(f"the run gave numbers that are not finite: {bad or error}") from error


def write_error(directory: Path, error: str) -> Path:
    """Stores why a run failed, and returns the file."""
    path = directory / ERROR
    write_text(path, error.rstrip() + "\n")
    return path


def read_record(directory: Path) -> Record | None:
    """The record of a run's directory, or None where the run is not done; a record that cannot be read is no record."""
    path = directory / RECORD
    try:
        values = json.loads(content(path))
        values["config"] = _config(values["config"])
        record = Record(**values)
        if record.key != directory.name:
            raise ValueError(f"it is the record of run {record.key}")
        # Numbers that are no numbers would only fail later, in a table.
        dict.fromkeys([*record.metrics, *record.stages])
        sum([record.sparsity, *record.metrics.values(), *record.seconds.values()])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read and counts as not done: %s", path, error)
        return None
    return record


def _config(values: Mapping[str, Any]) -> RunConfig:
    """The settings that plain values say; parts that are equal in many records are made, and held, once."""
    parts = {name: _part(name, json.dumps(value)) if name in PARTS else value for name, value in values.items()}
    return build(RunConfig, parts, "config")


@lru_cache(maxsize=1024)
def _part(name: str, text: str) -> Any:
    return build(PARTS[name], json.loads(text), f"config: {name}")


def load_records(results: Path) -> list[Record]:
    """All finished runs of a results directory, in the order of their keys.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"there is no results directory {str(results)!r}")
    found = (read_record(path.parent) for path in sorted((results / "runs").glob(f"*/{RECORD}")))
    return [record for record in found if record is not None]
