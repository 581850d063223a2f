"""Masks learned on the pretraining losses, with the weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vlprune.config import AtLeastOne, CalibrationConfig, validated
from vlprune.masks import Masks
from vlprune.pruners.layerwise import layer_counts
from vlprune.pruners.pruner import Alive, Measure, Pruner, Search, Stats, Weights, check_inputs
from vlprune.selection import select_counts, select_lowest

START = 2.0  # first variable of a kept entry, in units of the magnitude threshold
RATE, RATE_STEPS = 5e-5, 3000  # the reference's first learning rate and its number of steps
DECAY = 0.01  # AdamW's decoupled weight decay, applied to the variables


@validated
class TamtOptions:
    """Options of tamt.

    Attributes:
        steps: number of optimizer steps, each on one fresh calibration batch.
    """

    steps: AtLeastOne = 16


DEFAULTS = TamtOptions()


def learn(
    pruner: Pruner,
    weights: Weights,
    measure: Measure,
    *,
    sparsity: float,
    modality: Mapping[str, str],  # noqa: ARG001
    seed: int,  # noqa: ARG001
    options: TamtOptions = DEFAULTS,
) -> Masks:
    """Masks by task-agnostic mask training, Liu et al. 2022 (arXiv:2204.11218).

    Every entry has a variable, at first START times the global magnitude threshold where magnitudes within the layer
    keep it, else 0. At each step the round(sparsity * N) lowest variables of the model are pruned, and AdamW moves all
    variables by the straight-through gradient: that of the pruned weight times the dense weight. Its rate falls
    linearly to 0.

    Deviations from the code of Farina et al. 2024 (arXiv:2404.05621): counts are exact, where its first threshold masks
    the whole network; the gradient goes to the variable itself, where its gradient of the absolute value is 0 at 0, so
    that no pruned entry returns; the rates of all steps have the sum of its 3000, however many steps there are; dropout
    is off.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} dense; not changed.
        measure: `grad` at the pruned weights, on the fresh batch of each step.
        sparsity: pruned fraction, in [0, 1).
        modality: not used.
        seed: not used.
        options: the number of optimizer steps.
    """

    def checked(current: Weights, step: int) -> Stats:
        stats = measure(current, step)
        check_inputs(pruner, current, stats)
        return stats

    n_edges = sum(weight.numel() for weight in weights.values())
    return _train(weights, checked, n_pruned=round(sparsity * n_edges), steps=options.steps)


def tamt_update(weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None) -> Masks:
    """Masks after one step of `learn` with given gradients.

    Args:
        weights: {layer name: (out, in)}.
        stats: `grad` (out, in) of every layer.
        n_pruned: number of entries to prune in all layers together.
        alive: must be None, a ValueError otherwise: a pruned entry may come back.
    """
    if alive is not None:
        raise ValueError("method 'tamt' cannot prune in steps: its pruned entries may come back")
    return _train(weights, lambda current, step: stats, n_pruned=n_pruned, steps=1)  # noqa: ARG005


def first_variables(weights: Weights, n_pruned: int) -> dict[str, Tensor]:
    """The variables (out, in) before training: START times the global magnitude threshold, or 0.

    They are 0 where the magnitudes within the layer prune the entry.
    """
    magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
    kept = select_lowest(magnitudes, n_pruned)
    pruned = [magnitudes[name][~mask] for name, mask in kept.items()]
    threshold = max((float(part.max()) for part in pruned if part.numel()), default=0.0)
    within_layers = select_counts(magnitudes, layer_counts(weights, n_pruned))
    return {name: START * threshold * mask.to(weights[name].dtype) for name, mask in within_layers.items()}


def _train(weights: Weights, measure: Callable[[Weights, int], Stats], *, n_pruned: int, steps: int) -> Masks:
    dense = {name: weight.detach() for name, weight in weights.items()}
    variables = first_variables(dense, n_pruned)
    optimizer = torch.optim.AdamW(variables.values(), lr=RATE * (RATE_STEPS + 1) / (steps + 1), weight_decay=DECAY)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        kept = select_lowest(variables, n_pruned)
        stats = measure({name: weight * kept[name] for name, weight in dense.items()}, step)
        for name, variable in variables.items():
            variable.grad = stats[name]["grad"] * dense[name]
        optimizer.step()
        decay.step()
    return Masks(select_lowest(variables, n_pruned))


def plan_batches(calibration: CalibrationConfig, options: TamtOptions = DEFAULTS) -> tuple[int, int]:  # noqa: ARG001
    """A fresh batch for each step of the optimizer."""
    return options.steps, 1


def fewer_batches(options: TamtOptions, n_batches: int) -> dict[str, int]:
    """Options for at most so many batches, one for each step."""
    return {"steps": min(options.steps, n_batches)}


LEARN = Search(run=learn, plan=plan_batches, limited=fewer_batches)
TAMT = Pruner(
    name="tamt",
    source="task-agnostic mask training, Liu et al. 2022 (arXiv:2204.11218)",
    needs=frozenset({"grad"}),
    update=tamt_update,
    search=LEARN,
    options=TamtOptions,
)
