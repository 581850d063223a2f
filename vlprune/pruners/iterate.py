"""Pruning in steps: statistics are measured again at the sparse weights before each one."""

from __future__ import annotations

from collections.abc import Mapping

from vlprune.masks import Masks
from vlprune.pruners.pruner import Measure, Pruner, Search, Weights, prune_masks

SCHEDULES = ("exp", "linear", "const")


def schedule(sparsity: float, steps: int, kind: str = "exp") -> list[float]:
    """Sparsity after each of the steps, not decreasing; the last one is exactly `sparsity`.

    exp prunes the same fraction of the survivors at every step, 1 - (1 - s)^((t + 1) / T); linear the same number,
    s (t + 1) / T (the reference climbs from s to 1 instead); const everything at the first step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if kind == "exp":
        levels = [1 - (1 - sparsity) ** ((t + 1) / steps) for t in range(steps)]
    elif kind == "linear":
        levels = [sparsity * (t + 1) / steps for t in range(steps)]
    elif kind == "const":
        levels = [sparsity] * steps
    else:
        raise ValueError(f"unknown schedule {kind!r}; there are: {', '.join(SCHEDULES)}")
    return [*levels[:-1], sparsity]


def iterate(
    pruner: Pruner,
    weights: Weights,
    measure: Measure,
    *,
    sparsity: float,
    steps: int,
    modality: Mapping[str, str],
    seed: int = 0,
    kind: str = "exp",
) -> Masks:
    """Masks of an iterative method at one sparsity; a pruned entry never comes back.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} dense; not changed.
        measure: statistics at the sparse weights, on the fresh batches of each step.
        sparsity: pruned fraction at the end, in [0, 1).
        steps: number of steps.
        modality: {layer name: modality}.
        seed: of the method's own random choices.
        kind: of the schedule.

    Returns:
        The masks of the last step, with `weights` when the method moves them.
    """
    current = weights
    masks: Masks | None = None
    for step, level in enumerate(schedule(sparsity, steps, kind)):
        stats = measure(current, step)
        [masks] = prune_masks(pruner, current, stats, sparsities=[level], modality=modality, seed=seed, alive=masks)
        moved = masks.weights or current
        current = {name: moved[name].detach().masked_fill(~mask, 0.0) for name, mask in masks.items()}
    assert masks is not None
    return masks


STEPS = Search(run=iterate, plan=lambda calibration: (calibration.steps, calibration.step_batches))
