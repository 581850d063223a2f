"""Pruner: a pruning method as plain functions, and the one function that runs any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlprune.masks import Masks
from vlprune.selection import select_counts_many, select_many

Weights = Mapping[str, Float[Tensor, "_ _"]]
LayerStats = Mapping[str, Tensor]
Stats = Mapping[str, LayerStats]
Alive = Mapping[str, Bool[Tensor, "_ _"]]

_LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float64)}


@runtime_checkable
class Allocate(Protocol):
    """How many entries every layer loses."""

    def __call__(
        self, weights: Weights, modality: Mapping[str, str], sparsities: Sequence[float]
    ) -> list[dict[str, int]]:
        """One {layer name: number of entries to prune} a sparsity."""
        ...


@runtime_checkable
class Update(Protocol):
    """A choice of the survivors together with their new values."""

    def __call__(self, weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None) -> Masks:
        """Masks with `weights`, `n_pruned` entries of the model pruned, none kept outside `alive` (None: all are)."""
        ...


@dataclass(frozen=True)
class Pruner:
    """A pruning method: either a `score` of single weights, or an `update` of all of them at once.

    Attributes:
        name: key in PRUNERS.
        source: the paper, arXiv id included.
        needs: statistics that calibration has to measure, of STATISTICS.
        score: (weight (out, in), statistics of the layer) -> (out, in), higher is kept longer; pure.
        within: who competes with whom when scores are selected: model, modality, layer or row.
        allocate: layer counts that replace `within`; scores then compete within their layer.
        update: for a method that moves the surviving weights; it replaces score and selection.
        iterative: statistics are measured again at every step of a schedule, see `iterate`.
        version: raised whenever its masks change, so that a sweep makes them again.
    """

    name: str
    source: str
    needs: frozenset[str] = frozenset()
    score: Callable[[Tensor, LayerStats], Tensor] | None = None
    within: str = "model"
    allocate: Allocate | None = None
    update: Update | None = None
    iterative: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if (self.score is None) == (self.update is None):
            raise ValueError(f"method '{self.name}' must have either a score or an update")
        if unknown := self.needs - STATISTICS.keys():
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are: {', '.join(STATISTICS)}")


# What can be measured at a layer with a weight (out, in), and its shape.
STATISTICS: dict[str, Callable[[int, int], tuple[int | None, ...]]] = {
    "input_sq": lambda _, n_in: (n_in,),
    "grad": lambda n_out, n_in: (n_out, n_in),
    "grad_rows": lambda n_out, n_in: (None, n_out * n_in),
    "row_size": lambda _n_out, _n_in: (),
}


def prune_masks(
    pruner: Pruner,
    weights: Weights,
    stats: Stats,
    *,
    sparsities: Sequence[float],
    modality: Mapping[str, str],
    seed: int = 0,
    alive: Alive | None = None,
) -> list[Masks]:
    """Masks of a method at each sparsity; scores and the first pass of the selection are shared.

    Exactly round(sparsity * N) of all N entries are pruned. An iterative method takes one step, of those statistics.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} in tie-break order; not changed.
        stats: {layer name: {statistic: Tensor}} with at least what the method needs; not changed.
        sparsities: pruned fractions, each in [0, 1).
        modality: {layer name: modality}.
        seed: of the method's own random choices.
        alive: the entries that may be kept, so that pruned ones do not come back; None for all. Only for methods whose
            entries compete within the model: a layer's own count could need a dead entry.

    Raises:
        ValueError: for a missing or misshaped statistic, a NaN or infinite weight or score, a sparsity outside [0, 1),
            more survivors wanted than are alive.
    """
    _check_inputs(pruner, weights, stats)
    if alive is not None and (pruner.within != "model" or pruner.allocate is not None):
        raise ValueError(f"method '{pruner.name}' cannot prune in steps: its entries do not compete within the model")
    n_edges = sum(weight.numel() for weight in weights.values())
    n_alive = n_edges if alive is None else sum(int(mask.sum()) for mask in alive.values())
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        if n_edges - round(sparsity * n_edges) > n_alive:
            raise ValueError(f"sparsity {sparsity} keeps more entries than the {n_alive} of {n_edges} that are alive")
    weights = {name: weight.detach() for name, weight in weights.items()}
    with torch.no_grad():
        if pruner.update is not None:
            counts = [round(sparsity * n_edges) for sparsity in sparsities]
            return [pruner.update(weights, stats, n_pruned=count, alive=alive) for count in counts]
        scores = _scores(pruner, weights, stats, seed, alive)
        if pruner.allocate is not None:
            kept = select_counts_many(scores, pruner.allocate(weights, modality, sparsities))
        else:
            kept = select_many(scores, sparsities, pruner.within, modality)
        return [Masks(masks) for masks in kept]


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer's random numbers, in [0, 2^63): the layers do not depend on their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1


def _scores(pruner: Pruner, weights: Weights, stats: Stats, seed: int, alive: Alive | None) -> dict[str, Tensor]:
    assert pruner.score is not None
    scores = {}
    for name, weight in weights.items():
        layer_stats = {**stats.get(name, {}), "seed": torch.tensor(layer_seed(seed, name))}
        score = pruner.score(weight, layer_stats)
        # The dead score below anything finite, so that even a tie at zero cannot revive one.
        scores[name] = score if alive is None else score.masked_fill(~alive[name], _LOWEST[score.dtype])
    return scores


def _check_inputs(pruner: Pruner, weights: Weights, stats: Stats) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"layer '{name}': weights must be finite, got NaN or infinity")
        given = stats.get(name, {})
        for need in sorted(pruner.needs):
            if need not in given:
                there = ", ".join(sorted(given)) or "none"
                raise ValueError(f"method '{pruner.name}' needs the statistic '{need}' of layer '{name}'; got: {there}")
            wanted = STATISTICS[need](*weight.shape)
            shape = tuple(given[need].shape)
            if len(shape) != len(wanted) or any(w not in (None, s) for w, s in zip(wanted, shape)):
                text = tuple("n" if size is None else size for size in wanted)
                raise ValueError(f"layer '{name}': statistic '{need}' must have shape {text}, got {shape}")
