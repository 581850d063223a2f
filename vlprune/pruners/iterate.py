"""Pruning in steps: statistics are measured again at the sparse weights before each one."""

from __future__ import annotations

from collections.abc import Mapping

from vlprune.config import AtLeastOne, CalibrationConfig, validated
from vlprune.masks import Masks
from vlprune.pruners.pruner import Measure, Pruner, Search, Weights, prune_masks


@validated
class StepOptions:
    """Options of a method that prunes in steps.

    Attributes:
        steps: number of pruning steps.
        step_batches: number of fresh calibration batches that each step measures on.
    """

    steps: AtLeastOne = 4
    step_batches: AtLeastOne = 4


DEFAULTS = StepOptions()


def schedule(sparsity: float, steps: int) -> list[float]:
    """Sparsity after each of the steps, not decreasing; the last one is exactly `sparsity`.

    Every step prunes the same fraction of the survivors: 1 - (1 - sparsity)^((t + 1) / steps) after step t, which is
    [0.5, 0.75] for two steps to 0.75.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    levels = [1 - (1 - sparsity) ** ((t + 1) / steps) for t in range(steps)]
    return [*levels[:-1], sparsity]


def iterate(
    pruner: Pruner,
    weights: Weights,
    measure: Measure,
    *,
    sparsity: float,
    modality: Mapping[str, str],
    seed: int = 0,
    options: StepOptions = DEFAULTS,
) -> Masks:
    """Masks of an iterative method at one sparsity; a pruned entry never comes back.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} dense; not changed.
        measure: statistics at the sparse weights, on the fresh batches of each step.
        sparsity: pruned fraction at the end, in [0, 1).
        modality: {layer name: modality}.
        seed: seeds the method's own random choices.
        options: the number of steps.

    Returns:
        The masks of the last step, with `weights` when the method moves them.
    """
    current = weights
    masks: Masks | None = None
    for step, level in enumerate(schedule(sparsity, options.steps)):
        stats = measure(current, step)
        [masks] = prune_masks(pruner, current, stats, sparsities=[level], modality=modality, seed=seed, alive=masks)
        moved = masks.weights or current
        current = {name: moved[name].detach().masked_fill(~mask, 0.0) for name, mask in masks.items()}
    assert masks is not None
    return masks


def plan_steps(calibration: CalibrationConfig, options: StepOptions = DEFAULTS) -> tuple[int, int]:  # noqa: ARG001
    """(number of steps, number of fresh batches in each)."""
    return options.steps, options.step_batches


def fewer_steps(options: StepOptions, n_batches: int) -> dict[str, int]:
    """Options for a plan of at most so many batches: a step less rather than a step without a batch."""
    steps = min(options.steps, n_batches)
    return {"steps": steps, "step_batches": min(options.step_batches, n_batches // steps)}


STEPS = Search(run=iterate, plan=plan_steps, limited=fewer_steps)
