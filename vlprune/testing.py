"""The contract of a pruning method as checks, for the methods of this project and for your own.

    from vlprune import Pruner
    from vlprune.testing import check_pruner

    def taylor_score(weight, stats):
        return (weight * stats["grad"]).square()

    def test_taylor():
        check_pruner(Pruner(name="taylor", source="…", needs=frozenset({"grad"}), score=taylor_score))

Nothing here needs a model or data: four small made-up layers of a vision, a text and a fusion tower stand for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from eval.options import NoOptions
from vlprune.config import CalibrationConfig, ConfigError
from vlprune.masks import Masks
from vlprune.pruners.pruner import Pruner, Stats, Weights, prune_masks, search_masks
from vlprune.statistics import STATISTICS

SHAPES = {"eyes.0": (24, 16), "eyes.1": (16, 24), "words": (8, 40), "both": (30, 10)}
MODALITY = {"eyes.0": "vision", "eyes.1": "vision", "words": "text", "both": "fusion"}
SPARSITIES = (0.0, 0.3, 0.63, 0.75, 0.9, 0.999)

_N_ROWS = 5
_SCALES = {"eyes.0": 0.05, "eyes.1": 0.02, "words": 0.1, "both": 0.03}


def check_pruner(pruner: Pruner, *, scale_free: Iterable[str] = ()) -> None:
    """Runs every check of CHECKS that applies to a method.

    Args:
        pruner: the method.
        scale_free: names of the statistics of which a positive factor common to a layer must change no mask. It is
            what a method of `input_sq` should promise: by what number of inputs that sum is divided is not defined.

    Raises:
        AssertionError: in one sentence, what the method should have done and what it did; where it raised another
            error, that error is its cause.
    """
    for check in CHECKS:
        run_check(check, pruner)
    for statistic in scale_free:
        run_check(lambda method, statistic=statistic: factor_changes_no_mask(method, statistic), pruner)


def run_check(check: Callable[[Pruner], None], pruner: Pruner) -> None:
    """Runs one check, and raises an AssertionError for any error in it."""
    try:
        check(pruner)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"method '{pruner.name}' raised {type(error).__name__}: {error}") from error


# ---- made-up layers ----


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal weights, of another scale in each layer."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * _SCALES[name] for name, shape in SHAPES.items()}


def random_stats(seed: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """All statistics of these layers, which agree with each other as those of one calibration do."""
    generator = torch.Generator().manual_seed(seed)
    stats = {}
    for name, (n_out, n_in) in SHAPES.items():
        rows = torch.randn(_N_ROWS, n_out * n_in, generator=generator) * 0.1
        inputs = torch.randn(40, n_in, generator=generator)
        stats[name] = {
            "input_sq": inputs.square().sum(0),
            "input_outer": inputs.T @ inputs,
            "grad": rows.mean(0).view(n_out, n_in),
            "grad_sq": rows.square().mean(0).view(n_out, n_in),
            "grad_rows": rows,
            "row_size": torch.tensor(8.0),
            "zo_grad": torch.rand((), generator=generator),
        }
    return stats


def equal_inputs(value: float) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights and statistics that are all the same number, so that everything ties."""
    weights = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    stats = {
        name: {
            kind: torch.full([size or _N_ROWS for size in statistic.shape(*shape)], value)
            for kind, statistic in STATISTICS.items()
        }
        for name, shape in SHAPES.items()
    }
    for of_layer in stats.values():
        of_layer["row_size"].fill_(8.0)
    return weights, stats


# ---- checks ----


def masks_are_well_formed_and_exact(pruner: Pruner) -> None:
    """Masks name the layers in order, have their shapes, and prune exactly round(sparsity * N) entries."""
    for sparsity, masks in zip(SPARSITIES, _prune(pruner, random_weights(), random_stats()), strict=True):
        _check_form(pruner, masks, sparsity)


def ties_do_not_change_the_count(pruner: Pruner) -> None:
    """All weights and statistics equal, or all of them zero: exactly as many entries are pruned."""
    for value in (0.0, 0.5):
        for sparsity, masks in zip(SPARSITIES, _prune(pruner, *equal_inputs(value)), strict=True):
            _check_form(pruner, masks, sparsity)


def the_same_inputs_give_the_same_masks(pruner: Pruner) -> None:
    """No state is kept between calls, and torch's global random numbers are neither read nor moved on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = _prune(pruner, random_weights(), random_stats(), seed=3)
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        second = _prune(pruner, random_weights(), random_stats(), seed=3)
        untouched = torch.equal(torch.random.get_rng_state(), before)
    for sparsity, a, b in zip(SPARSITIES, first, second, strict=True):
        _require(_equal(a, b), f"method '{pruner.name}' gives other masks for the same inputs at sparsity {sparsity}")
    _require(untouched, f"method '{pruner.name}' draws from torch's global random numbers: draw from `seed`")


def inputs_stay_as_they_are(pruner: Pruner) -> None:
    """Neither weights nor statistics are changed."""
    weights, stats = random_weights(), random_stats()
    _prune(pruner, weights, stats)
    for name, weight in random_weights().items():
        _require(torch.equal(weights[name], weight), f"method '{pruner.name}' changes the weights of layer '{name}'")
    for name, of_layer in random_stats().items():
        same = stats[name].keys() == of_layer.keys()
        same = same and all(torch.equal(stats[name][kind], value) for kind, value in of_layer.items())
        _require(same, f"method '{pruner.name}' changes the statistics of layer '{name}'")


def sparsities_do_not_touch_each_other(pruner: Pruner) -> None:
    """The masks at a sparsity are the same, asked for alone or with others."""
    for sparsity, masks in zip(SPARSITIES, _prune(pruner, random_weights(), random_stats()), strict=True):
        [alone] = _prune(pruner, random_weights(), random_stats(), [sparsity])
        _require(
            _equal(masks, alone), f"method '{pruner.name}' gives other masks at {sparsity} with further sparsities"
        )


def a_higher_sparsity_keeps_a_subset(pruner: Pruner) -> None:
    """No entry returns at a higher sparsity, of a method that scores and has no allocation of its own."""
    if pruner.score is None or pruner.allocate is not None:
        return
    masks = _prune(pruner, random_weights(), random_stats())
    for sparsity, fewer, more in zip(SPARSITIES[1:], masks[1:], masks, strict=False):
        nested = all(bool((fewer[name] <= more[name]).all()) for name in SHAPES)
        _require(nested, f"method '{pruner.name}' keeps an entry at {sparsity} that it prunes at a lower sparsity")


def parameters_are_taken(pruner: Pruner) -> None:
    """Weights that require gradients give the masks of those that do not."""
    parameters = {name: torch.nn.Parameter(weight) for name, weight in random_weights().items()}
    [masks] = _prune(pruner, parameters, random_stats(), [0.63])
    [plain] = _prune(pruner, random_weights(), random_stats(), [0.63])
    _require(_equal(masks, plain), f"method '{pruner.name}' gives other masks for parameters than for tensors")
    moved = list((masks.weights or {}).values())
    _require(not any(weight.requires_grad for weight in moved), f"method '{pruner.name}' gives weights with gradients")


def needs_are_complete(pruner: Pruner) -> None:
    """Statistics that `needs` does not name are not read."""
    stats = {name: {kind: of_layer[kind] for kind in pruner.needs} for name, of_layer in random_stats().items()}
    [masks] = _prune(pruner, random_weights(), stats, [0.75])
    [with_all] = _prune(pruner, random_weights(), random_stats(), [0.75])
    _require(_equal(masks, with_all), f"method '{pruner.name}' reads statistics that its `needs` does not name")


def bad_inputs_are_refused(pruner: Pruner) -> None:
    """A weight or a statistic that is not finite, missing or misshaped is a ValueError that names the layer."""
    bad_weights = random_weights()
    bad_weights["words"][2, 3] = torch.nan
    _refused(pruner, "a NaN weight", "'words'", lambda: _prune(pruner, bad_weights, random_stats()))
    for kind in sorted(pruner.needs):
        stats = random_stats()
        stats["words"][kind].view(-1)[-1] = torch.nan
        _refused(pruner, f"a NaN in '{kind}'", "'words'", lambda stats=stats: _prune(pruner, random_weights(), stats))
        stats = random_stats()
        stats["words"][kind] = torch.zeros(3, 3)
        _refused(
            pruner, f"a misshaped '{kind}'", "'words'", lambda stats=stats: _prune(pruner, random_weights(), stats)
        )
        del stats["words"][kind]
        _refused(pruner, f"no '{kind}'", "'words'", lambda stats=stats: _prune(pruner, random_weights(), stats))


def entries_that_are_dead_stay_dead(pruner: Pruner) -> None:
    """Given the entries that may be kept, no other is kept, even where all tie; or that is a ValueError."""
    generator = torch.Generator().manual_seed(0)
    alive = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    for weights, stats in ((random_weights(), random_stats()), equal_inputs(0.0)):
        try:
            [masks] = _prune(pruner, weights, stats, [0.75], alive=alive)
        except ValueError as error:
            _names(pruner, f"'{pruner.name}'", error)
            return
        _check_form(pruner, masks, 0.75)
        kept_dead = any(bool((masks[name] & ~alive[name]).any()) for name in SHAPES)
        _require(not kept_dead, f"method '{pruner.name}' keeps an entry that `alive` excludes")


def patterns_hold_in_every_group(pruner: Pruner) -> None:
    """Of every M consecutive inputs N are kept, by a method that takes a pattern; the others refuse it."""
    names = [name for name, (_, n_in) in SHAPES.items() if n_in % 8 == 0]
    weights, stats = {name: random_weights()[name] for name in names}, random_stats()
    for n, m in ((1, 2), (2, 4), (4, 8)):
        if not pruner.takes_pattern:
            text = f"'{pruner.name}'"
            _refused(pruner, "a pattern", text, lambda: _prune(pruner, weights, stats, [0.5], pattern="2:4"))
            return
        [masks] = _prune(pruner, weights, stats, [0.5], pattern=f"{n}:{m}")
        for name, mask in masks.items():
            holds = bool((mask.reshape(-1, m).sum(1) == n).all())
            _require(holds, f"method '{pruner.name}' does not keep {n} of every {m} inputs of layer '{name}'")


def a_search_is_exact_and_pure(pruner: Pruner) -> None:
    """A search prunes exactly, the same every time, leaves the weights, and asks for the steps that it planned."""
    if pruner.search is None:
        return
    n_steps, n_batches = pruner.search.plan(CalibrationConfig())
    _require(n_steps >= 1 <= n_batches, f"method '{pruner.name}' plans {n_steps} steps of {n_batches} batches")
    for sparsity in (0.0, 0.63, 0.999):
        masks = [_search(pruner, random_weights(), sparsity, n_steps) for _ in range(2)]
        _check_form(pruner, masks[0], sparsity)
        _require(_equal(*masks), f"the search of method '{pruner.name}' gives other masks for the same inputs")
    weights = random_weights()
    _search(pruner, weights, 0.5, n_steps)
    same = all(torch.equal(weights[name], weight) for name, weight in random_weights().items())
    _require(same, f"the search of method '{pruner.name}' changes the weights it is given")


def a_search_refuses_missing_statistics(pruner: Pruner) -> None:
    """Statistics without what the method needs are a ValueError that names the method, in a search too."""
    if pruner.search is None or not pruner.needs:
        return

    def measure(current: Weights, step: int, layers: Sequence[str] | None = None) -> Stats:  # noqa: ARG001
        return {}

    text = f"'{pruner.name}'"
    _refused(
        pruner,
        "no statistics",
        text,
        lambda: search_masks(pruner, random_weights(), measure, sparsity=0.5, modality=MODALITY),
    )


def options_default_to_those_of_the_functions(pruner: Pruner) -> None:
    """The method with its default options gives the masks of the method as it is; unknown options are refused."""
    default = pruner.with_options({})
    [masks], [plain] = (_prune(method, random_weights(), random_stats(), [0.63]) for method in (default, pruner))
    _require(_equal(masks, plain), f"the functions of method '{pruner.name}' have other defaults than its options")
    if pruner.search is not None and default.search is not None:
        plans = [method.plan(CalibrationConfig()) for method in (pruner.search, default.search)]
        _require(plans[0] == plans[1], f"the plan of method '{pruner.name}' has other defaults than its options")
        for n_batches in (1, 2, 3, 7) if pruner.options is not NoOptions else ():
            fewer = pruner.with_options(pruner.limited({}, n_batches)).search
            n_steps, each = fewer.plan(CalibrationConfig(n_batches=n_batches)) if fewer else (0, 0)
            _require(
                1 <= n_steps * each <= n_batches,
                f"method '{pruner.name}' plans {n_steps * each} of {n_batches} batches",
            )
    try:
        pruner.with_options({"no such option": 1})
    except ConfigError:
        return
    raise AssertionError(f"method '{pruner.name}' takes an option that it does not have")


def factor_changes_no_mask(pruner: Pruner, statistic: str) -> None:
    """A positive factor common to a layer, another one for each, in one statistic: masks stay as they are."""
    scaled = random_stats()
    for i, of_layer in enumerate(scaled.values()):
        of_layer[statistic] *= 4.0 ** (i - 2)  # a power of four, so that the root is exact as well
    ours, plain = (_prune(pruner, random_weights(), stats) for stats in (scaled, random_stats()))
    for a, b in zip(ours, plain, strict=True):
        same = all(torch.equal(a[name], b[name]) for name in SHAPES)
        _require(same, f"a factor in '{statistic}' of a layer changes masks of method '{pruner.name}'")


CHECKS: tuple[Callable[[Pruner], None], ...] = (
    masks_are_well_formed_and_exact,
    ties_do_not_change_the_count,
    the_same_inputs_give_the_same_masks,
    inputs_stay_as_they_are,
    sparsities_do_not_touch_each_other,
    a_higher_sparsity_keeps_a_subset,
    parameters_are_taken,
    needs_are_complete,
    bad_inputs_are_refused,
    entries_that_are_dead_stay_dead,
    patterns_hold_in_every_group,
    a_search_is_exact_and_pure,
    a_search_refuses_missing_statistics,
    options_default_to_those_of_the_functions,
)


# ---- what checks share ----


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _prune(
    pruner: Pruner, weights: Weights, stats: Stats, sparsities: Sequence[float] = SPARSITIES, **more: Any
) -> list[Masks]:
    return prune_masks(pruner, weights, stats, sparsities=sparsities, modality=MODALITY, **more)


def _search(pruner: Pruner, weights: Weights, sparsity: float, n_steps: int) -> Masks:
    def measure(current: Weights, step: int, layers: Sequence[str] | None = None) -> Stats:
        _require(list(current) == list(SHAPES), f"the search of method '{pruner.name}' measures without all weights")
        _require(0 <= step < n_steps, f"the search of method '{pruner.name}' measures at step {step} of {n_steps}")
        stats = random_stats(seed=20 + step)
        return {name: {kind: stats[name][kind] for kind in pruner.needs} for name in layers or SHAPES}

    return search_masks(pruner, weights, measure, sparsity=sparsity, modality=MODALITY)


def _check_form(pruner: Pruner, masks: Masks, sparsity: float) -> None:
    at = f"method '{pruner.name}' at sparsity {sparsity}"
    _require(list(masks) == list(SHAPES), f"{at} must give masks in the order of the layers, gave {list(masks)}")
    for name, mask in masks.items():
        _require(mask.dtype == torch.bool, f"{at} must give bool masks, gave {mask.dtype} for layer '{name}'")
        _require(tuple(mask.shape) == SHAPES[name], f"{at} gives layer '{name}' a mask of shape {tuple(mask.shape)}")
        if masks.weights is not None:
            weight = masks.weights[name]
            fits = weight.shape == mask.shape and weight.dtype == torch.float32
            _require(fits, f"{at} must give moved weights in shape and dtype of layer '{name}'")
            _require(bool(weight.isfinite().all()), f"{at} gives layer '{name}' weights that are not finite")
            _require(bool((weight[~mask] == 0).all()), f"{at} gives pruned entries of layer '{name}' a value")
    n_edges = sum(mask.numel() for mask in masks.values())
    pruned, wanted = sum(int((~mask).sum()) for mask in masks.values()), round(sparsity * n_edges)
    _require(pruned == wanted, f"{at} must prune {wanted} of {n_edges} entries, pruned {pruned}")


def _equal(a: Masks, b: Masks) -> bool:
    if (a.weights is None) != (b.weights is None) or a.keys() != b.keys():
        return False
    pairs = [(a[name], b[name]) for name in a]
    pairs += [(weight, (b.weights or {})[name]) for name, weight in (a.weights or {}).items()]
    return all(torch.equal(x, y) for x, y in pairs)


def _refused(pruner: Pruner, what: str, text: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError as error:
        _names(pruner, text, error)
        return
    raise AssertionError(f"method '{pruner.name}' accepts {what}: it must raise a ValueError")


def _names(pruner: Pruner, text: str, error: ValueError) -> None:
    _require(text in str(error), f"an error of method '{pruner.name}' must name {text}, got: {error}")
