"""Pruner: a pruning method as plain functions, and the one function that runs any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlprune.config import CalibrationConfig, parse_pattern
from vlprune.masks import Masks
from vlprune.selection import select_counts_many, select_many, select_pattern

Weights = Mapping[str, Float[Tensor, "_ _"]]
LayerStats = Mapping[str, Tensor]
Stats = Mapping[str, LayerStats]
Alive = Mapping[str, Bool[Tensor, "_ _"]]

_LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float64)}


@runtime_checkable
class Allocate(Protocol):
    """How many entries every layer loses."""

    def __call__(
        self, weights: Weights, stats: Stats, modality: Mapping[str, str], sparsities: Sequence[float]
    ) -> list[dict[str, int]]:
        """One {layer name: number of entries to prune} a sparsity."""
        ...


@runtime_checkable
class Update(Protocol):
    """A choice of the survivors of all layers together, with their new values where the method moves them."""

    def __call__(self, weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None) -> Masks:
        """Masks with `n_pruned` entries of the model pruned, none kept outside `alive` (None: all are)."""
        ...


@runtime_checkable
class Measure(Protocol):
    """What a search asks for as it goes."""

    def __call__(self, current: Weights, step: int, layers: Sequence[str] | None = None) -> Stats:
        """Statistics at the current weights of all layers, on the batches of a step, of these layers (None: all)."""
        ...


@runtime_checkable
class Run(Protocol):
    """A search for the masks at one sparsity."""

    def __call__(
        self,
        pruner: Pruner,
        weights: Weights,
        measure: Measure,
        *,
        sparsity: float,
        steps: int,
        modality: Mapping[str, str],
        seed: int,
    ) -> Masks:
        """Masks with round(sparsity * N) entries pruned; `weights` are dense and not changed."""
        ...


@dataclass(frozen=True)
class Search:
    """How a method that measures anew as it goes finds its masks.

    Attributes:
        run: the search.
        plan: calibration -> (steps, fresh batches at each).
    """

    run: Run
    plan: Callable[[CalibrationConfig], tuple[int, int]]


@dataclass(frozen=True)
class Pruner:
    """A pruning method: either a `score` of single weights, or an `update` of all of them at once.

    Attributes:
        name: key in PRUNERS.
        source: the paper, arXiv id included.
        needs: statistics that calibration has to measure, of STATISTICS.
        score: (weight (out, in), statistics of the layer) -> (out, in), higher is kept longer; pure.
        within: who competes with whom when scores are selected: model, modality, layer or row.
        allocate: layer counts; scores then compete within their layer, or within its rows when `within` is row.
        update: for a method that moves the surviving weights or learns its masks; it replaces score and selection.
        search: for a method that measures its statistics anew as it goes; None for a method of one shot.
        version: raised whenever its masks change, so that a sweep makes them again.
    """

    name: str
    source: str
    needs: frozenset[str] = frozenset()
    score: Callable[[Tensor, LayerStats], Tensor] | None = None
    within: str = "model"
    allocate: Allocate | None = None
    update: Update | None = None
    search: Search | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if (self.score is None) == (self.update is None):
            raise ValueError(f"method '{self.name}' must have either a score or an update")
        if unknown := self.needs - STATISTICS.keys():
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are: {', '.join(STATISTICS)}")

    @property
    def takes_pattern(self) -> bool:
        """Whether `prune_masks` takes an N:M pattern: a method must score single weights, in one shot."""
        return self.score is not None and self.search is None


# What can be measured at a layer with a weight (out, in), and its shape.
STATISTICS: dict[str, Callable[[int, int], tuple[int | None, ...]]] = {
    "input_sq": lambda _, n_in: (n_in,),
    "grad": lambda n_out, n_in: (n_out, n_in),
    "grad_rows": lambda n_out, n_in: (None, n_out * n_in),
    "row_size": lambda _n_out, _n_in: (),
    "grad_sq": lambda n_out, n_in: (n_out, n_in),
    "input_outer": lambda _, n_in: (n_in, n_in),
    "zo_grad": lambda _n_out, _n_in: (),
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
    pattern: str | None = None,
) -> list[Masks]:
    """Masks of a method at each sparsity; scores and the first pass of the selection are shared.

    Exactly round(sparsity * N) of all N entries are pruned. A method with a search takes one step, of those statistics.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} in tie-break order; not changed.
        stats: {layer name: {statistic: Tensor}} with at least what the method needs; not changed.
        sparsities: pruned fractions, each in [0, 1).
        modality: {layer name: modality}.
        seed: of the method's own random choices.
        alive: the entries that may be kept, so that pruned ones do not come back; None for all. Only for methods whose
            entries compete within the model: a layer's own count could need a dead entry.
        pattern: "N:M" keeps the N highest scores of every M consecutive inputs of an output node, whatever `within`
            and `allocate` of the method say; every sparsity must then be 1 - N / M. Only for methods of one shot that
            score single weights: the steps of a search go through sparsities that a pattern does not have.

    Raises:
        ValueError: for a missing or misshaped statistic, a NaN or infinite weight or score, a sparsity outside [0, 1),
            more survivors wanted than are alive, a pattern that the method, a sparsity or a layer cannot have.
    """
    check_inputs(pruner, weights, stats)
    if alive is not None and (pruner.within != "model" or pruner.allocate is not None):
        raise ValueError(f"method '{pruner.name}' cannot prune in steps: its entries do not compete within the model")
    if pattern is not None:
        _check_pattern(pruner, pattern, sparsities)
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
        if pattern is not None:
            kept = [select_pattern(scores, *parse_pattern(pattern)) for _ in sparsities]
        elif pruner.allocate is not None:
            counts = pruner.allocate(weights, stats, modality, sparsities)
            kept = select_counts_many(_places(scores) if pruner.within == "row" else scores, counts)
        else:
            kept = select_many(scores, sparsities, pruner.within, modality)
        return [Masks(masks) for masks in kept]


def check_inputs(pruner: Pruner, weights: Weights, stats: Stats) -> None:
    """Raises a ValueError, with the layer, for weights that are not finite and statistics missing or misshaped."""
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


def _places(scores: Mapping[str, Float[Tensor, "out in"]]) -> dict[str, Float[Tensor, "out in"]]:
    """The place of every score in the ascending order of its row, so that a layer's count is shared by its rows.

    All rows lose the same number, and the earlier ones one more where the count is not a multiple of them: equal places
    are ties, which go by flat index.
    """
    places = {}
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"layer '{name}': scores must be finite, got NaN or infinity")
        order = torch.arange(score.shape[1], dtype=score.dtype, device=score.device).expand_as(score)
        places[name] = torch.empty_like(score).scatter_(1, score.argsort(dim=1, stable=True), order)
    return places


def _check_pattern(pruner: Pruner, pattern: str, sparsities: Sequence[float]) -> None:
    if not pruner.takes_pattern:
        raise ValueError(f"method '{pruner.name}' takes no pattern: only methods that score weights in one shot do")
    kept, of = parse_pattern(pattern)
    if wrong := [sparsity for sparsity in sparsities if sparsity != 1 - kept / of]:
        raise ValueError(f"the sparsity of pattern {pattern} must be {1 - kept / of:g}, got {wrong[0]:g}")
