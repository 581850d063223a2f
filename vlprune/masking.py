"""Masks of a model at a sparsity, from its statistics or from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.batch import Batch
from vlprune.calibrate.collect import UNCACHED, Statistics, collect, load_statistics, save_statistics
from vlprune.calibrate.rows import Rows
from vlprune.config import PruningConfig, RunConfig
from vlprune.contents import contents
from vlprune.data import calibration_batches
from vlprune.masks import Masks
from vlprune.models import ModelAdapter
from vlprune.pruners import check_pruning, get_pruner, prune_masks
from vlprune.store.cache import cached
from vlprune.store.keys import masks_key, statistics_key
from vlprune.store.masks import load_masks, save_masks


def compute_masks(
    model: ModelAdapter,
    method: str,
    sparsity: float,
    *,
    stats: Statistics | None = None,
    batches: Callable[[int], Iterable[Batch]] | None = None,
    steps: int = 1,
    seed: int = 0,
    pattern: str | None = None,
    lam: float | None = None,
    alignment: float = 1.0,
    new_rows: Callable[[], Rows] = Rows,
) -> Masks:
    """Masks of a model at a sparsity; the model is as before.

    Args:
        model: not changed.
        method: a key of PRUNERS.
        sparsity: in [0, 1); exactly round(sparsity · N) of N entries are pruned.
        stats: statistics of `collect` with what the method needs.
        batches: of a method with a search instead: step -> its fresh batches.
        steps: of such a search.
        seed: of the method's own random choices.
        pattern: "N:M", for methods that score single weights in one shot.
        lam: ridge of chita and chita++; None: the default.
        alignment: weight of the ITC loss in what a search measures; `collect` has its own.
        new_rows: makes the store of gradient rows of each step of a search.

    Raises:
        ValueError: an unknown method, statistics that are missing, batches that are missing, a pattern or ridge that
            the method does not have.
    """
    check_pruning(PruningConfig(method, sparsity, pattern, lam))
    pruner = get_pruner(method, lam)
    weights = {layer.name: model.weight(layer.name).detach().clone() for layer in model.graph}
    modality = model.graph.modality
    if pruner.search is None:
        [masks] = prune_masks(
            pruner, weights, stats or {}, sparsities=[sparsity], modality=modality, seed=seed, pattern=pattern
        )
        masks.aliases = model.graph.aliases
        return masks
    if batches is None:
        raise ValueError(f"method {method!r} measures anew as it goes: it needs `batches`, not `stats`")

    def measure_at(current: Mapping[str, Tensor], step: int, layers: Sequence[str] | None = None) -> Statistics:
        with _weights(model, current):
            return collect(
                model, batches(step), pruner.needs, seed + step, alignment=alignment, layers=layers, rows=new_rows()
            )

    masks = pruner.search.run(pruner, weights, measure_at, sparsity=sparsity, steps=steps, modality=modality, seed=seed)
    masks.aliases = model.graph.aliases
    return masks


def cached_masks(
    config: RunConfig,
    model: ModelAdapter,
    cache: Path,
    needs: Set[str],
    new_rows: Callable[[], Rows] = Rows,
    *,
    skip_broken: bool = False,
) -> Masks:
    """The masks of a config, from the cache or made and stored there."""
    calibration, pruning = config.calibration, config.pruning
    pruner = get_pruner(pruning.method, pruning.lam)
    found = contents(config)

    def draw(first: int, n_batches: int) -> Iterable[Batch]:
        size, seed = calibration.batch_size, config.seed
        return calibration_batches(
            calibration.data,
            model,
            n_batches=n_batches,
            batch_size=size,
            seed=seed,
            first=first,
            skip_broken=skip_broken,
        )

    def measure(wanted: Set[str]) -> Statistics:
        batches, alignment = draw(0, calibration.n_batches), calibration.alignment
        return collect(model, batches, wanted, config.seed, alignment=alignment, rows=new_rows())

    def statistics() -> Statistics:
        if not pruner.needs:
            return {}
        if pruner.needs & UNCACHED:
            return measure(pruner.needs)
        wanted = (needs | pruner.needs) - UNCACHED
        return cached(
            cache / "statistics" / f"{statistics_key(config, found, ' '.join(sorted(wanted)))}.safetensors",
            make=lambda: measure(wanted),
            save=save_statistics,
            load=lambda path: load_statistics(path, model.device),
        )

    def make() -> Masks:
        settings: dict[str, Any] = {"seed": config.seed, "pattern": pruning.pattern, "lam": pruning.lam}
        if pruner.search is None:
            return compute_masks(model, pruner.name, pruning.sparsity, stats=statistics(), **settings)
        steps, per_step = pruner.search.plan(calibration)
        return compute_masks(
            model,
            pruner.name,
            pruning.sparsity,
            batches=lambda step: draw(step * per_step, per_step),
            steps=steps,
            alignment=calibration.alignment,
            new_rows=new_rows,
            **settings,
        )

    provenance = {
        "model": f"{config.model} {found.model}",
        "method": f"{pruner.name} ({pruner.source})",
        "pruning": repr(config.pruning),
        "seed": str(config.seed),
        **({"calibration": repr(calibration)} if pruner.needs or pruner.search else {}),
        "modality": json.dumps(model.graph.modality),
    }
    return cached(
        cache / "masks" / f"{masks_key(config, found)}.safetensors",
        make=make,
        save=lambda masks, path: save_masks(path, masks, provenance),
        load=lambda path: _on(model.device, load_masks(path)),
    )


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
