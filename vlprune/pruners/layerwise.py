"""Pruning block by block: every layer sees the inputs that the pruned layers before it leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from vlprune.config import CalibrationConfig
from vlprune.masks import Masks
from vlprune.pruners.pruner import Measure, Pruner, Search, Weights, check_inputs
from vlprune.selection import shares


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """{block: its layers}, in order.

    A block's name is that of its layers up to the last number: `text.layer.3` for `text.layer.3.mlp.fc1`. A layer
    without a number is a block of its own.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        end = max((i + 1 for i, part in enumerate(parts) if part.isdigit()), default=len(parts))
        found.setdefault(".".join(parts[:end]), []).append(name)
    return found


def layerwise(
    pruner: Pruner,
    weights: Weights,
    measure: Measure,
    *,
    sparsity: float,
    modality: Mapping[str, str],  # noqa: ARG001
    seed: int,  # noqa: ARG001
) -> Masks:
    """Masks and weights of a method that updates each layer by itself.

    Block after block, in the order of the layers, as Frantar & Alistarh 2023 (arXiv:2301.00774) go: the inputs of a
    block's layers are measured in the model pruned so far, then its layers are pruned. All layers are equally sparse;
    together they lose round(sparsity * N) entries.

    Args:
        pruner: the method, with an update.
        weights: {layer name: (out, in)} dense; not changed.
        measure: statistics of a block's layers; all on the batches of step 0.
        sparsity: pruned fraction, in [0, 1).
        modality: not used.
        seed: not used.
    """
    assert pruner.update is not None
    counts = layer_counts(weights, round(sparsity * sum(weight.numel() for weight in weights.values())))
    current = {name: weight.detach() for name, weight in weights.items()}
    masks = {}
    for layers in blocks(weights).values():
        stats = measure(current, 0, layers=layers)
        check_inputs(pruner, {name: current[name] for name in layers}, stats)
        for name in layers:
            with torch.no_grad():
                pruned = pruner.update({name: current[name]}, stats, n_pruned=counts[name], alive=None)
            assert pruned.weights is not None
            masks[name], current[name] = pruned[name], pruned.weights[name]
    return Masks({name: masks[name] for name in weights}, current)


def layer_counts(weights: Weights, n_pruned: int) -> dict[str, int]:
    """How many entries each layer loses, in proportion to their sizes, by largest remainder."""
    sizes = [weight.numel() for weight in weights.values()]
    return dict(zip(weights, shares(sizes, n_pruned / sum(sizes)).tolist()))


def plan_once(calibration: CalibrationConfig) -> tuple[int, int]:
    """One step, on as many batches as a method of one shot measures on."""
    return 1, calibration.n_batches


LAYERWISE = Search(run=layerwise, plan=plan_once)
