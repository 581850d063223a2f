"""The first stage of a run: what calibration batches tell about every layer, one artifact for each statistic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprune.batch import Batch
from vlprune.calibrate.collect import STATISTICS_VERSION, Statistics, collect, load_statistics, save_statistics
from vlprune.calibrate.rows import Rows
from vlprune.config import CalibrationConfig, RunConfig, changed
from vlprune.data import calibration_batches
from vlprune.execution import Execution
from vlprune.models import ModelAdapter
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.stage import Bench, Made, Stage
from vlprune.statistics import STATISTICS
from vlprune.store.doing import say_step


def statistics_stages(config: RunConfig, kinds: Collection[str], known: Fingerprints) -> tuple[Stage[Statistics], ...]:
    """A stage for each of these kinds of statistics, all of which are measured in one pass.

    Args:
        config: the settings of the run.
        kinds: keys of STATISTICS.
        known: the fingerprints.
    """

    def make(stages: Sequence[Stage[Statistics]], _inputs: Sequence[Any], bench: Bench) -> list[Made[Statistics]]:
        model = bench.pretrained(config.model)
        measured = measure(model, config, [stage.member for stage in stages], bench.execution)
        return [Made({layer: {stage.member: own[stage.member]} for layer, own in measured.items()}) for stage in stages]

    return tuple(
        Stage(
            kind="statistics",
            member=kind,
            reads=calibration_reads(config, [kind], known, n_batches=config.calibration.n_batches),
            make=make,
            file=_file,
            save=lambda made, path: save_statistics(made.value, path),
            load=lambda path, bench: load_statistics(path, bench.device),
        )
        for kind in sorted(kinds)
    )


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of several kinds as one: {layer name: {statistic: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for layer, own in part.items():
            found.setdefault(layer, {}).update(own)
    return dict(found)


def calibration_reads(
    config: RunConfig, kinds: Iterable[str], known: Fingerprints, *, n_batches: int, without: Collection[str] = ()
) -> dict[str, Any]:
    """What statistics depend on.

    Args:
        config: the settings of the run.
        kinds: keys of STATISTICS.
        known: the fingerprints.
        n_batches: number of batches that are drawn.
        without: names of settings of the calibration that are not read.
    """
    settings = changed(config.calibration)
    settings.pop("data", None)  # counts by its content
    for name in without:
        settings.pop(name, None)
    missing = known.left_out_of_calibration(config, n_batches)
    if not any(STATISTICS[kind].reads_losses for kind in kinds):
        settings.pop("alignment", None)
    return {
        "model": known.model(config.model),
        "data": known.data(config.calibration.data),
        "seed": config.seed,
        "code": STATISTICS_VERSION,
        **({"calibration": settings} if settings else {}),
        **({"left_out": missing} if missing else {}),
    }


def draw(
    calibration: CalibrationConfig,
    model: ModelAdapter,
    seed: int,
    execution: Execution,
    *,
    first: int = 0,
    n_batches: int | None = None,
) -> Iterable[Batch]:
    """Batches of the calibration data: `n_batches` (None: those of the config) from number `first` on."""
    return calibration_batches(
        calibration.data,
        model,
        n_batches=calibration.n_batches if n_batches is None else n_batches,
        batch_size=calibration.batch_size,
        seed=seed,
        first=first,
        skip_broken=execution.skip_broken,
        threads=execution.workers,
    )


def told(batches: Iterable[Batch], total: int, first: int = 0) -> Iterator[Batch]:
    """The batches; while one is measured on, this process says which one of how many it is.

    Args:
        batches: some of the batches.
        total: number of all batches.
        first: number of the first of these among them, from 0.
    """
    for number, batch in enumerate(batches, first):
        say_step(f"calibration, batch {number + 1} of {total}", number, total)
        yield batch


def gradient_rows(execution: Execution) -> Rows:
    """A new store of gradient rows."""
    return Rows(execution.spill_directory, execution.memory_limit)


def measure(model: ModelAdapter, config: RunConfig, kinds: Collection[str], execution: Execution) -> Statistics:
    """Statistics of these kinds of a model, on the batches of a config."""
    return collect(
        model,
        told(draw(config.calibration, model, config.seed, execution), config.calibration.n_batches),
        set(kinds),
        config.seed,
        alignment=config.calibration.alignment,
        rows=gradient_rows(execution),
    )


def _file(results: Path, key: str) -> Path:
    return results / "cache" / "statistics" / f"{key}.safetensors"
