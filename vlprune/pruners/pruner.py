"""Pruner: a pruning method as plain functions, and the two functions that run any of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eval.options import NoOptions
from vlprune.config import CalibrationConfig, ConfigError, Options, build, changed, parse_pattern
from vlprune.masks import Masks
from vlprune.selection import select_counts_many, select_many, select_pattern
from vlprune.statistics import STATISTICS

Weights = Mapping[str, Float[Tensor, "_ _"]]
LayerStats = Mapping[str, Tensor]
Stats = Mapping[str, LayerStats]
Alive = Mapping[str, Bool[Tensor, "_ _"]]

_LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float64)}


@runtime_checkable
class Score(Protocol):
    """A score for every entry of a layer; the higher ones are kept longer. A pure function."""

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Scores (out, in) for a weight (out, in), from the statistics of its layer."""
        ...


@runtime_checkable
class Allocate(Protocol):
    """A number of entries to prune for every layer."""

    def __call__(
        self, weights: Weights, stats: Stats, modality: Mapping[str, str], sparsities: Sequence[float]
    ) -> list[dict[str, int]]:
        """One {layer name: number of entries to prune} for each sparsity, round(sparsity * N) in all."""
        ...


@runtime_checkable
class Update(Protocol):
    """A choice of the survivors of all layers together, with their new values where the method moves them."""

    def __call__(self, weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None) -> Masks:
        """Masks with exactly `n_pruned` entries of all layers pruned and none kept outside `alive` (None: all are).

        A method that cannot respect `alive` raises a ValueError when it is given.
        """
        ...


@runtime_checkable
class Measure(Protocol):
    """What a search asks for as it goes: it prunes a little, measures the pruned model anew, and prunes further."""

    def __call__(self, current: Weights, step: int, layers: Sequence[str] | None = None) -> Stats:
        """Statistics of these layers (None: of all), in the model with the current weights, on the step's batches."""
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
        modality: Mapping[str, str],
        seed: int,
    ) -> Masks:
        """Masks with exactly round(sparsity * N) entries pruned; `weights` are dense and not changed."""
        ...


def _none_fewer(options: Any, n_batches: int) -> dict[str, Any]:  # noqa: ARG001
    return {}


@dataclass(frozen=True)
class Search:
    """The way in which a method that measures anew as it goes finds its masks.

    Attributes:
        run: the search.
        plan: calibration settings -> (number of steps, number of fresh batches that each step measures on).
        limited: (options, number of batches) -> {option: value} for a plan of no more batches than that.
    """

    run: Run
    plan: Callable[[CalibrationConfig], tuple[int, int]]
    limited: Callable[[Any, int], dict[str, Any]] = _none_fewer


@dataclass(frozen=True)
class Pruner:
    """A pruning method: either a `score` of single weights, or an `update` of all of them at once.

    Attributes:
        name: key in PRUNERS.
        source: the paper, with its arXiv id.
        needs: names of the statistics that calibration has to measure, keys of STATISTICS.
        score: scores of the entries of one layer.
        within: who competes with whom when scores are selected: model, modality, layer or row.
        allocate: the number of entries that each layer loses; scores then compete within their layer, or within its
            rows when `within` is row.
        update: masks of all layers, for a method that moves the surviving weights or learns its masks; it replaces
            score and selection.
        search: for a method that measures its statistics anew as it goes; None for a method of one shot.
        draws: whether the score makes random choices; the statistics of a layer then hold `seed`, a number for it.
        options: the dataclass of the settings that this method owns. Any of its functions may take a keyword `options`
            beside its arguments, whose default holds the defaults; `with_options` binds it.
        given_options: the options that `with_options` bound, as plain values, where they differ from their defaults.
    """

    name: str
    source: str
    needs: frozenset[str] = frozenset()
    score: Score | None = None
    within: str = "model"
    allocate: Allocate | None = None
    update: Update | None = None
    search: Search | None = None
    draws: bool = False
    options: type = NoOptions
    given_options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        if (self.score is None) == (self.update is None):
            raise ValueError(f"method '{self.name}' must have either a score or an update")
        if unknown := self.needs - STATISTICS.keys():
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are: {', '.join(STATISTICS)}")
        if self.options is not NoOptions and not any(map(_takes_options, self._functions)):
            raise ValueError(f"method '{self.name}' has options, but no function that takes a keyword `options`")

    @property
    def takes_pattern(self) -> bool:
        """Whether `prune_masks` takes an N:M pattern: a method must score single weights, in one shot."""
        return self.score is not None and self.search is None

    @property
    def code(self) -> tuple[Callable[..., Any], ...]:
        """The functions that decide this method's masks.

        With `within` and the options, that is all: masks made by the same code, from the same statistics, are the same.
        """
        return (search_masks if self.search else prune_masks, *self._functions)

    @property
    def _functions(self) -> tuple[Callable[..., Any], ...]:
        search = (self.search.run, self.search.plan) if self.search else ()
        return tuple(f for f in (self.score, self.allocate, self.update, *search) if f is not None)

    def with_options(self, values: Mapping[str, Any]) -> Pruner:
        """The method with options that differ from their defaults, such as {"lam": 1.0}.

        Raises:
            ConfigError: an option that the method does not have, a value of another type or out of range.
        """
        options = self._build(values)
        if self.options is NoOptions:
            return self

        def bound(function: Any) -> Any:
            if function is None or not _takes_options(function):
                return function
            return partial(function, options=options)

        search = self.search and replace(self.search, run=bound(self.search.run), plan=bound(self.search.plan))
        return replace(
            self,
            score=bound(self.score),
            allocate=bound(self.allocate),
            update=bound(self.update),
            search=search,
            given_options=Options(changed(options)),
        )

    def limited(self, values: Mapping[str, Any], n_batches: int) -> dict[str, Any]:
        """The given options, with steps reduced so that a search draws no more than `n_batches` batches."""
        options = self._build(values)
        fewer = self.search.limited(options, n_batches) if self.search else {}
        return {**values, **{name: value for name, value in fewer.items() if value != getattr(options, name)}}

    def _build(self, values: Mapping[str, Any]) -> Any:
        known = [option.name for option in fields(self.options)]
        for name in values:
            if name not in known:
                there = ", ".join(known)
                has = f"there are: {there}" if there else "it has none"
                raise ConfigError(f"method '{self.name}' has no option {name!r}; {has}")
        return build(self.options, values, f"method '{self.name}'")


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

    Exactly round(sparsity * N) of all N entries are pruned. A method with a search takes one step, with the statistics
    given.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} in tie-break order; not changed.
        stats: {layer name: {statistic: Tensor}} with at least what the method needs; not changed.
        sparsities: pruned fractions, each in [0, 1).
        modality: {layer name: modality}.
        seed: seeds the method's own random choices.
        alive: the entries that may be kept, so that pruned ones do not come back; None for all. Only for methods whose
            entries compete within the model: a layer's own count could need a dead entry.
        pattern: "N:M" keeps the N highest scores of every M consecutive inputs of an output node, whatever `within`
            and `allocate` of the method say; every sparsity must then be 1 - N / M. Only for methods of one shot that
            score single weights: the steps of a search go through sparsities that a pattern does not have.

    Raises:
        ValueError: for a missing or misshaped statistic, a NaN or infinite weight or score, a sparsity outside [0, 1),
            more survivors wanted than are alive, a pattern that the method, a sparsity or a layer cannot have, a method
            that prunes another number of entries than asked.
    """
    check_inputs(pruner, weights, stats)
    if alive is not None and (pruner.within != "model" or pruner.allocate is not None):
        raise ValueError(f"method '{pruner.name}' cannot prune in steps: its entries do not compete within the model")
    if pattern is not None:
        _check_pattern(pruner, pattern, sparsities)
    n_edges = sum(weight.numel() for weight in weights.values())
    n_alive = n_edges if alive is None else sum(int(mask.sum()) for mask in alive.values())
    counts = [_count(weights, sparsity) for sparsity in sparsities]
    for sparsity, count in zip(sparsities, counts):
        if n_edges - count > n_alive:
            raise ValueError(f"sparsity {sparsity} keeps more entries than the {n_alive} of {n_edges} that are alive")
    weights = {name: weight.detach() for name, weight in weights.items()}
    with torch.no_grad():
        if pruner.update is not None:
            found = [pruner.update(weights, stats, n_pruned=count, alive=alive) for count in counts]
        else:
            found = _selected(pruner, weights, stats, sparsities, modality, seed, alive, pattern)
    for masks, count in zip(found, counts):
        _check_masks(pruner, weights, masks, count)
    return found


def search_masks(
    pruner: Pruner,
    weights: Weights,
    measure: Measure,
    *,
    sparsity: float,
    modality: Mapping[str, str],
    seed: int = 0,
) -> Masks:
    """Masks of a method with a search, which measures anew as it goes; exactly round(sparsity * N) entries are pruned.

    Args:
        pruner: the method.
        weights: {layer name: (out, in)} dense, in tie-break order; not changed.
        measure: statistics at other weights, on the batches of a step that `pruner.search.plan` counts.
        sparsity: pruned fraction, in [0, 1).
        modality: {layer name: modality}.
        seed: seeds the method's own random choices.

    Raises:
        ValueError: as in `prune_masks`; a method without a search.
    """
    if pruner.search is None:
        raise ValueError(f"method '{pruner.name}' has no search: its masks come from statistics measured once")
    count = _count(weights, sparsity)
    masks = pruner.search.run(pruner, weights, measure, sparsity=sparsity, modality=modality, seed=seed)
    _check_masks(pruner, weights, masks, count)
    return masks


def check_inputs(pruner: Pruner, weights: Weights, stats: Stats) -> None:
    """Raises a ValueError, with the layer, for weights that are not finite and statistics missing or misshaped."""
    for name, weight in weights.items():
        # A finite sum has finite terms, and takes a fraction of the time of a test of every entry.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise ValueError(f"layer '{name}': weights must be finite, got NaN or infinity")
        given = stats.get(name, {})
        for need in sorted(pruner.needs):
            if need not in given:
                there = ", ".join(sorted(given)) or "none"
                raise ValueError(f"method '{pruner.name}' needs the statistic '{need}' of layer '{name}'; got: {there}")
            wanted = STATISTICS[need].shape(*weight.shape)
            shape = tuple(given[need].shape)
            if len(shape) != len(wanted) or any(w not in (None, s) for w, s in zip(wanted, shape)):
                text = tuple("n" if size is None else size for size in wanted)
                raise ValueError(f"layer '{name}': statistic '{need}' must have shape {text}, got {shape}")


def layer_seed(seed: int, name: str) -> int:
    """The seed for one layer's random numbers, in [0, 2^63); it does not depend on the other layers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1


def _takes_options(function: Any) -> bool:
    return "options" in inspect.signature(function).parameters


def _count(weights: Weights, sparsity: float) -> int:
    """The number of entries to prune of all layers together."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    return round(sparsity * sum(weight.numel() for weight in weights.values()))


def _selected(
    pruner: Pruner,
    weights: Weights,
    stats: Stats,
    sparsities: Sequence[float],
    modality: Mapping[str, str],
    seed: int,
    alive: Alive | None,
    pattern: str | None,
) -> list[Masks]:
    """Masks of a method that scores."""
    scores = _scores(pruner, weights, stats, seed, alive)
    if pattern is not None:
        kept = [select_pattern(scores, *parse_pattern(pattern)) for _ in sparsities]
    elif pruner.allocate is not None:
        counts = pruner.allocate(weights, stats, modality, sparsities)
        kept = select_counts_many(_places(scores) if pruner.within == "row" else scores, counts)
    else:
        kept = select_many(scores, sparsities, pruner.within, modality)
    return [Masks(masks) for masks in kept]


def _scores(pruner: Pruner, weights: Weights, stats: Stats, seed: int, alive: Alive | None) -> dict[str, Tensor]:
    assert pruner.score is not None
    scores = {}
    for name, weight in weights.items():
        drawn = {"seed": torch.tensor(layer_seed(seed, name))} if pruner.draws else {}
        score = pruner.score(weight, {**stats.get(name, {}), **drawn})
        # Dead entries score below anything finite, so that even a tie at zero cannot revive one.
        scores[name] = score if alive is None else score.masked_fill(~alive[name], _LOWEST[score.dtype])
    return scores


def _places(scores: Mapping[str, Float[Tensor, "_ _"]]) -> dict[str, Float[Tensor, "_ _"]]:
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


def _check_masks(pruner: Pruner, weights: Weights, masks: Masks, n_pruned: int) -> None:
    """Raises a ValueError for masks of other layers or shapes, or of another number of pruned entries than asked."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    found = {name: tuple(mask.shape) for name, mask in masks.items()}
    for name in shapes | found:
        if found.get(name) != shapes.get(name):
            raise ValueError(
                f"method '{pruner.name}' must give layer '{name}' a mask of shape {shapes.get(name)}, "
                f"gave {found.get(name)}"
            )
    n_edges = sum(mask.numel() for mask in masks.values())
    pruned = n_edges - sum(int(mask.count_nonzero()) for mask in masks.values())
    if pruned != n_pruned:
        raise ValueError(f"method '{pruner.name}' must prune {n_pruned} of {n_edges} entries, pruned {pruned}")
