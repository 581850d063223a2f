"""The second stage of a run: which weights stay, by a method at a sparsity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.batch import Batch
from vlprune.calibrate.collect import Statistics, collect
from vlprune.calibrate.rows import Rows
from vlprune.config import CalibrationConfig, Options, PruningConfig, RunConfig
from vlprune.masks import Masks
from vlprune.models import ModelAdapter
from vlprune.pruners import PRUNERS, Pruner, check_pruning, get_pruner, prune_masks, search_masks
from vlprune.seeds import VERSION as SEEDS_VERSION
from vlprune.seeds import seed_of
from vlprune.stages.fingerprints import Fingerprints, pruner_code
from vlprune.stages.stage import Bench, Made, Stage
from vlprune.stages.statistics import calibration_reads, draw, gradient_rows, measure, merged, statistics_stages, told
from vlprune.statistics import STATISTICS
from vlprune.store.masks import load_masks, save_masks

Batches = Callable[[int], Iterable[Batch]]


def masks_stage(config: RunConfig, known: Fingerprints) -> Stage[Masks]:
    """The stage that prunes; a method of one shot prunes to all sparsities that are wanted in one pass.

    Args:
        config: the settings of the run, with a method.
        known: the fingerprints.

    Raises:
        ValueError: an unknown method, options or a pattern that it does not have.
    """
    check_pruning(config.pruning)
    pruner = get_pruner(config.pruning.method, config.pruning.options)
    inputs = statistics_stages(config, pruner.needs, known) if _reads_artifacts(pruner) else ()

    def make(stages: Sequence[Stage[Masks]], inputs: Sequence[Statistics], bench: Bench) -> list[Made[Masks]]:
        model = bench.pretrained(config.model)
        sparsities = [float(stage.member) for stage in stages]
        if pruner.search is not None:
            found = [_searched(model, pruner, config, sparsity, bench) for sparsity in sparsities]
        else:
            stored = _reads_artifacts(pruner)
            stats = merged(inputs) if stored else measure(model, config, pruner.needs, bench.execution)
            found = one_shot(model, pruner, sparsities, stats, seed=config.seed, pattern=config.pruning.pattern)
        origin = provenance(config, known, model)
        return [
            Made(masks, {**origin, "pruning": repr(replace(config.pruning, sparsity=sparsity))})
            for masks, sparsity in zip(found, sparsities, strict=True)
        ]

    return Stage(
        kind="masks",
        member=repr(config.pruning.sparsity),
        reads=_reads(config, pruner, known),
        inputs=inputs,
        runs_model=not _reads_artifacts(pruner),
        make=make,
        file=masks_file,
        save=lambda made, path: save_masks(path, made.value, made.facts),
        load=lambda path, bench: _on(bench.device, load_masks(path)),
    )


def settings_read(method: str) -> frozenset[str]:
    """The dotted names of the settings of calibration and pruning that a method reads.

    Example:
        >>> settings_read("omp")
        frozenset({'pruning.pattern'})
    """
    pruner = PRUNERS[method]
    read = {"pruning.pattern", *(f"pruning.options.{option.name}" for option in fields(pruner.options))}
    if pruner.needs:
        read |= {"calibration.data", "calibration.batch_size"}
        if any(STATISTICS[kind].reads_losses for kind in pruner.needs):
            read.add("calibration.alignment")
        few, many = (CalibrationConfig(n_batches=n) for n in (1, 2))
        if pruner.search is None or pruner.search.plan(few) != pruner.search.plan(many):
            read.add("calibration.n_batches")
    return frozenset(read)


def masks_file(results: Path, key: str) -> Path:
    """Where the masks of a key are."""
    return results / "cache" / "masks" / f"{key}.safetensors"


def provenance(config: RunConfig, known: Fingerprints, model: ModelAdapter) -> dict[str, str]:
    """Where masks come from, as the header of their file and a model card say it."""
    pruner = get_pruner(config.pruning.method)
    measures = pruner.needs or pruner.search
    return {
        "model": f"{config.model.name} {known.model(config.model)['files']}",
        "method": f"{pruner.name} ({pruner.source})",
        "pruning": repr(config.pruning),
        **({"seed": str(config.seed)} if measures or pruner.draws else {}),
        **({"calibration": repr(config.calibration)} if measures else {}),
        "modality": json.dumps(model.graph.modality),
    }


def compute_masks(
    model: ModelAdapter,
    method: str,
    sparsity: float,
    *,
    stats: Statistics | None = None,
    batches: Batches | None = None,
    options: Mapping[str, Any] | None = None,
    pattern: str | None = None,
    calibration: CalibrationConfig | None = None,
    seed: int = 0,
    new_rows: Callable[[], Rows] = Rows,
) -> Masks:
    """Masks of a model at a sparsity; the model is as before.

    Args:
        model: the pretrained model.
        method: a key of PRUNERS.
        sparsity: pruned fraction, in [0, 1); exactly round(sparsity · N) of N weights are pruned.
        stats: statistics of `collect`, at least those that the method needs.
        batches: what a method with a search needs instead: number of a step -> the fresh batches of that step.
        options: settings of the method, such as {"lam": 0.1} of chita.
        pattern: "N:M", for methods that score single weights in one shot.
        calibration: settings of which a search takes the weight of the ITC loss; `collect` has its own.
        seed: seeds the method's own random choices.
        new_rows: makes the store of gradient rows of each step of a search.

    Raises:
        ValueError: an unknown method, statistics or batches that are missing, a pattern or option that the method does
            not have.
    """
    config = PruningConfig(method, sparsity, pattern, Options(options))
    check_pruning(config)
    pruner = get_pruner(method, config.options)
    if pruner.search is None:
        [masks] = one_shot(model, pruner, [sparsity], stats or {}, seed=seed, pattern=pattern)
        return masks
    if batches is None:
        raise ValueError(f"method {method!r} measures anew as it goes: it needs `batches`, not `stats`")
    return searched(
        model, pruner, sparsity, batches, calibration=calibration or CalibrationConfig(), seed=seed, new_rows=new_rows
    )


def one_shot(
    model: ModelAdapter,
    pruner: Pruner,
    sparsities: Sequence[float],
    stats: Statistics,
    *,
    seed: int,
    pattern: str | None,
) -> list[Masks]:
    """Masks at each sparsity, of a method that scores or updates once."""
    weights = {layer.name: model.weight(layer.name).detach().clone() for layer in model.graph}
    found = prune_masks(
        pruner,
        weights,
        stats,
        sparsities=sparsities,
        modality=model.graph.modality,
        seed=seed,
        pattern=pattern,
    )
    for masks in found:
        masks.aliases = model.graph.aliases
    return found


def searched(
    model: ModelAdapter,
    pruner: Pruner,
    sparsity: float,
    batches: Batches,
    *,
    calibration: CalibrationConfig,
    seed: int,
    new_rows: Callable[[], Rows],
) -> Masks:
    """Masks at a sparsity, of a method that measures statistics anew as it goes."""
    weights = {layer.name: model.weight(layer.name).detach().clone() for layer in model.graph}

    def measure_at(current: Mapping[str, Tensor], step: int, layers: Sequence[str] | None = None) -> Statistics:
        with _weights(model, current):
            return collect(
                model,
                batches(step),
                pruner.needs,
                seed_of(seed, "search step", step),
                alignment=calibration.alignment,
                layers=layers,
                rows=new_rows(),
            )

    masks = search_masks(pruner, weights, measure_at, sparsity=sparsity, modality=model.graph.modality, seed=seed)
    masks.aliases = model.graph.aliases
    return masks


def _searched(model: ModelAdapter, pruner: Pruner, config: RunConfig, sparsity: float, bench: Bench) -> Masks:
    assert pruner.search is not None
    steps, per_step = pruner.search.plan(config.calibration)

    def batches(step: int) -> Iterable[Batch]:
        first = step * per_step
        drawn = draw(config.calibration, model, config.seed, bench.execution, first=first, n_batches=per_step)
        # A search of one step may measure on its batches several times, such as for one layer after another.
        return told(drawn, steps * per_step, first) if steps > 1 else drawn

    return searched(
        model,
        pruner,
        sparsity,
        batches,
        calibration=config.calibration,
        seed=config.seed,
        new_rows=lambda: gradient_rows(bench.execution),
    )


def _reads_artifacts(pruner: Pruner) -> bool:
    """Whether the method is made from stored statistics: in one shot, and from none that are too large for a file."""
    return pruner.search is None and all(STATISTICS[kind].stored for kind in pruner.needs)


def _reads(config: RunConfig, pruner: Pruner, known: Fingerprints) -> dict[str, Any]:
    """What masks depend on besides the statistics they are made from."""
    reads: dict[str, Any] = {
        "model": known.model(config.model),
        "method": config.pruning.method,
        "code": pruner_code(pruner.name),
    }
    if pruner.draws:
        reads["seed"] = config.seed
    if config.pruning.pattern:
        reads["pattern"] = config.pruning.pattern
    if options := pruner.given_options:
        reads["options"] = dict(options)
    if not _reads_artifacts(pruner):
        reads["needs"] = sorted(pruner.needs)
        n_batches, without = config.calibration.n_batches, ()
        if pruner.search is not None:
            # The number of batches that a search draws is what it plans.
            reads["plan"] = steps, per_step = pruner.search.plan(config.calibration)
            reads["seeds"] = SEEDS_VERSION
            n_batches, without = steps * per_step, ("n_batches",)
        reads["measured"] = calibration_reads(config, pruner.needs, known, n_batches=n_batches, without=without)
    return reads


def _on(device: torch.device, masks: Masks) -> Masks:
    weights = None if masks.weights is None else {name: w.to(device) for name, w in masks.weights.items()}
    return Masks({name: mask.to(device) for name, mask in masks.items()}, weights, masks.aliases)


@contextmanager
def _weights(model: ModelAdapter, current: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights while inside."""
    own = {name: model.weight(name).detach().clone() for name in current}
    try:
        _write(model, current)
        yield
    finally:
        _write(model, own)


def _write(model: ModelAdapter, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            model.weight(name).copy_(weight)
