"""Keys of what a run makes: digests of everything that changes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, is_dataclass, replace

from vlprune.config import DENSE, CalibrationConfig, PruningConfig, RunConfig


def digest(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as canonical JSON; dataclasses count as their fields."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a digest is made of plain values and dataclasses, got {type(value).__name__}")


@dataclass(frozen=True)
class Contents:
    """What a config only names, so that other weights, photos or code under an old name make other keys.

    Attributes:
        model: digest of the pretrained weights.
        model_code: version of how models are run and trained.
        calibration: digest of the calibration data; empty for the dense run, which reads none.
        statistics_code: version of what calibration measures; 0 for the dense run.
        method_code: version of the pruning method; 0 for the dense run.
        task: digest of the task's data.
        task_code: version of the task.
    """

    model: str
    model_code: int
    calibration: str
    statistics_code: int
    method_code: int
    task: str
    task_code: int


def statistics_key(config: RunConfig, contents: Contents, kind: str) -> str:
    """The cache key of calibration statistics; kind names what was measured and how."""
    return digest("statistics", *_measured(config, contents), kind)


def masks_key(config: RunConfig, contents: Contents) -> str:
    """The cache key of the masks that a config prunes to."""
    return digest("masks", *_measured(config, contents), config.pruning, contents.method_code)


def run_key(config: RunConfig, contents: Contents) -> str:
    """The key of a whole run: everything that changes its numbers. A dense run neither calibrates nor prunes."""
    if config.pruning.method == DENSE:
        config = replace(config, calibration=CalibrationConfig(), pruning=PruningConfig())
    # Data counts by its content and not by its name.
    task, calibration = replace(config.task, data=""), replace(config.calibration, data="")
    return digest("run", replace(config, task=task, calibration=calibration), contents)


def _measured(config: RunConfig, contents: Contents) -> tuple[object, ...]:
    # What the statistics depend on.
    calibration = replace(config.calibration, data=contents.calibration)
    return contents.model, contents.model_code, config.seed, calibration, contents.statistics_code
