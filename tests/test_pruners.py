"""The contract of vlprune.testing for every method of PRUNERS, and one case worked by hand for each."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.config import CalibrationConfig, ConfigError, Options, PruningConfig, validated
from vlprune.masks import Masks
from vlprune.pruners import (
    PRUNERS,
    STEPS,
    Pruner,
    Search,
    StepOptions,
    check_pruning,
    get_pruner,
    iterate,
    prune_masks,
    schedule,
    search_masks,
)
from vlprune.pruners.chita import ChitaOptions, block_boundaries, chita_update, solve, solve_support
from vlprune.pruners.multiflow import modality_prior
from vlprune.pruners.pruner import layer_seed
from vlprune.testing import (
    CHECKS,
    MODALITY,
    SHAPES,
    SPARSITIES,
    check_pruner,
    equal_inputs,
    random_stats,
    random_weights,
    run_check,
)

SCALE_FREE = {
    "multiflow": {"input_sq"},
    "wanda": {"input_sq"},
    "ecoflap": {"input_sq"},
    "sparsegpt": {"input_outer"},
}

every_pruner = pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS.keys())
iterative = pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if p.search is STEPS], ids=lambda p: p.name)


def inputs():
    return random_weights(), random_stats()


def prune(pruner, weights, stats, sparsities=SPARSITIES, **more):
    return prune_masks(pruner, weights, stats, sparsities=sparsities, modality=MODALITY, **more)


def n_pruned(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def assert_equal(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (a.weights is None) == (b.weights is None)
    if a.weights is not None:
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a)


# --- the contract ---------------------------------------------------------------------------------------------------


def test_the_table_names_every_method():
    wanted = ["random", "omp", "localmp", "l2", "lamp", "snip", "itersnip", "multiflow", "chita", "chita++"]
    assert set(wanted) | {"obd", "tamt", "wanda", "ecoflap", "sparsegpt"} <= set(PRUNERS)
    assert all(name == pruner.name for name, pruner in PRUNERS.items())


@every_pruner
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract(pruner, check):
    run_check(check, pruner)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_statistics_of_which_only_the_direction_counts(name):
    check_pruner(PRUNERS[name], scale_free=SCALE_FREE[name])


@every_pruner
def test_only_methods_that_move_weights_give_weights(pruner):
    [masks] = prune(pruner, *inputs(), [0.63])
    assert (masks.weights is not None) == (pruner.name in {"chita", "chita++", "sparsegpt"})


@pytest.mark.parametrize("name", ["multiflow", "ecoflap"])
def test_layer_counts_rise_with_the_sparsity(name):
    for lower, higher in pairwise(prune(PRUNERS[name], *inputs())):
        assert all((higher[layer] <= lower[layer]).all() for layer in SHAPES)


@pytest.mark.parametrize("sparsity", [-0.5, 1.0, 63.0])
def test_sparsities_outside_their_range_are_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        prune(PRUNERS["omp"], *inputs(), [sparsity])
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        search_masks(PRUNERS["itersnip"], random_weights(), none_measured, sparsity=sparsity, modality=MODALITY)


def none_measured(current, step, layers=None):
    return {}


@pytest.mark.parametrize("bad", [[float("inf")], [float("inf"), -float("inf")], [float("nan")]])
def test_weights_that_are_not_finite_are_refused_by_their_layer_and_the_largest_finite_ones_taken(bad):
    weights = random_weights()
    weights["words"][0, :2] = torch.finfo(torch.float32).max  # their sum is infinite
    prune(PRUNERS["omp"], weights, {}, [0.5])
    weights["words"][0, : len(bad)] = torch.tensor(bad)
    with pytest.raises(ValueError, match="layer 'words': weights must be finite, got NaN or infinity"):
        prune(PRUNERS["omp"], weights, {}, [0.5])


def test_a_missing_statistic_is_named_with_what_there_is():
    stats = random_stats()
    del stats["words"]["grad"]
    with pytest.raises(
        ValueError, match=r"'snip' needs the statistic 'grad' of layer 'words'; got: grad_rows, .*input_sq"
    ):
        prune(PRUNERS["snip"], random_weights(), stats)


def test_a_pruner_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="method 'x' must have either a score or an update"):
        Pruner(name="x", source="")
    with pytest.raises(ValueError, match=r"\['hessian'\]; there are: .*grad_rows"):
        replace(PRUNERS["snip"], needs=frozenset({"hessian"}))
    with pytest.raises(ValueError, match="method 'snip' has options, but no function"):
        replace(PRUNERS["snip"], options=StepOptions)


# --- methods that break the contract --------------------------------------------------------------------------------


def ones(weight, stats):
    return torch.ones_like(weight)


def noise(weight, stats):
    return torch.rand(weight.shape)


def in_place(weight, stats):
    return weight.abs_()


def secretive(weight, stats):
    return stats["input_sq"] * weight.abs()


def transposed(weight, stats):
    return weight.abs().T


def forgiving(weight, stats):
    return (stats["grad"] * weight).abs().nan_to_num()


def scaled(weight, stats):
    return weight.abs() + stats["input_sq"]


def too_few(weights, stats, *, n_pruned, alive):
    return Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})


def one_per_layer(weights, stats, modality, sparsities):
    return [dict.fromkeys(weights, 1) for _ in sparsities]


def stays_dense(pruner, weights, measure, *, sparsity, modality, seed):
    return Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})


def one_step(calibration):
    return 1, 1


BROKEN = {
    "draws from torch's global random numbers|gives other masks": Pruner("x", "", score=noise),
    "changes the weights of layer 'eyes.0'": Pruner("x", "", score=in_place, within="layer"),
    "input_sq": Pruner("x", "", score=secretive),
    "must give layer 'eyes.0' a mask of shape": Pruner("x", "", score=transposed),
    "accepts a NaN in 'grad'": Pruner("x", "", frozenset({"grad"}), score=forgiving),
    r"must prune \d+ of 1388 entries, pruned 0": Pruner("x", "", update=too_few),
    r"must prune \d+ of 1388 entries, pruned 4": Pruner("x", "", score=ones, allocate=one_per_layer),
    r"must prune 874 of 1388 entries, pruned 0": Pruner("x", "", score=ones, search=Search(stays_dense, one_step)),
}


@pytest.mark.parametrize("fact", BROKEN)
def test_a_method_that_breaks_the_contract_is_told_in_a_sentence(fact):
    with pytest.raises(AssertionError, match=f"method 'x' .*(?:{fact})"):
        check_pruner(BROKEN[fact])


def test_a_promise_about_scale_is_checked_where_it_is_given():
    pruner = Pruner("x", "", frozenset({"input_sq"}), score=scaled)
    check_pruner(pruner)
    with pytest.raises(AssertionError, match="a factor in 'input_sq' of a layer changes masks of method 'x'"):
        check_pruner(pruner, scale_free={"input_sq"})


def test_another_number_than_asked_never_becomes_masks():
    with pytest.raises(ValueError, match="method 'x' must prune 694 of 1388 entries, pruned 0"):
        prune(Pruner("x", "", update=too_few), *inputs(), [0.5])
    searching = Pruner("x", "", score=ones, search=Search(stays_dense, one_step))
    with pytest.raises(ValueError, match="method 'x' must prune 694 of 1388 entries, pruned 0"):
        search_masks(searching, random_weights(), none_measured, sparsity=0.5, modality=MODALITY)
    with pytest.raises(ValueError, match="method 'omp' has no search"):
        search_masks(PRUNERS["omp"], random_weights(), none_measured, sparsity=0.5, modality=MODALITY)


# --- options --------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown method 'multflow'.*'multiflow'.*random, omp"):
        get_pruner("multflow")
    with pytest.raises(ConfigError, match=r"unknown method 'xyz'.*random, omp"):
        get_pruner("xyz")
    assert get_pruner("omp") is PRUNERS["omp"]


def test_an_option_reaches_the_functions_that_take_it():
    weights, stats = inputs()
    pruner = get_pruner("chita++", {"lam": 3, "steps": 2, "step_batches": 1})
    assert pruner.search.plan(CalibrationConfig()) == (2, 1)
    assert pruner.given_options == Options(lam=3.0, steps=2, step_batches=1)
    assert get_pruner("chita++", {"lam": 3, "steps": 4}).given_options == Options(lam=3.0)
    [masks] = prune(pruner, weights, stats, [0.63])
    count = n_pruned(masks)
    assert_equal(masks, chita_update(weights, stats, n_pruned=count, alive=None, options=ChitaOptions(lam=3.0)))
    [default] = prune(PRUNERS["chita++"], weights, stats, [0.63])
    assert not torch.equal(default.weights["words"], masks.weights["words"])
    assert_equal(prune(pruner.with_options({}), weights, stats, [0.63])[0], default)


def test_options_that_a_method_does_not_have_are_refused():
    for name, options, fact in (
        ("omp", {"lam": 1.0}, "method 'omp' has no option 'lam'; it has none"),
        ("itersnip", {"lam": 1.0}, "method 'itersnip' has no option 'lam'; there are: steps, step_batches"),
        ("chita", {"lam": -1.0}, "method 'chita': lam must be above 0, got -1"),
        ("chita", {"lam": "1"}, "method 'chita': lam .* got '1'"),
        ("tamt", {"steps": 0}, "method 'tamt': steps must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=fact):
            get_pruner(name, options)
        with pytest.raises(ConfigError, match=fact):
            check_pruning(PruningConfig(name, 0.5, options=options))
    check_pruning(PruningConfig())
    check_pruning(PruningConfig("omp", 0.5, "2:4"))
    with pytest.raises(ConfigError, match=r"method 'chita' takes no pattern.*omp"):
        check_pruning(PruningConfig("chita", 0.5, "2:4"))


@validated
class PowerOptions:
    """Options of a method of the tests."""

    power: Literal[1, 2] = 1


def power_score(weight, stats, *, options=PowerOptions()):  # noqa: B008
    return weight.abs() ** options.power


def test_a_method_of_ones_own_has_options_in_one_line():
    pruner = Pruner("power", "", score=power_score, options=PowerOptions)
    check_pruner(pruner)
    weight = torch.tensor([[2.0, -3.0]])
    assert pruner.with_options({"power": 2}).score(weight, {}).tolist() == [[4.0, 9.0]]
    assert pruner.score(weight, {}).tolist() == [[2.0, 3.0]]
    assert power_score in pruner.code


def test_fewer_batches_mean_fewer_steps():
    plans = {}
    for name, pruner in PRUNERS.items():
        if pruner.search:
            options = [pruner.limited({}, n_batches) for n_batches in (1, 3, 8, 100)]
            plans[name] = [pruner.with_options(given).search.plan(CalibrationConfig()) for given in options]
    steps = [(1, 1), (3, 1), (4, 2), (4, 4)]
    assert plans == {
        "itersnip": steps,
        "chita++": steps,
        "sparsegpt": [(1, 8)] * 4,
        "tamt": [(1, 1), (3, 1), (8, 1), (16, 1)],
    }
    assert PRUNERS["chita++"].limited({"lam": 3.0, "steps": 2}, 2) == {"lam": 3.0, "steps": 2, "step_batches": 1}
    assert PRUNERS["chita++"].limited({"lam": 3.0}, 16) == {"lam": 3.0}
    assert PRUNERS["omp"].limited({}, 1) == {}


# --- patterns -------------------------------------------------------------------------------------------------------


def test_a_pattern_keeps_the_highest_scores_of_every_group():
    pruner = PRUNERS["multiflow"]
    weights, stats = ({name: value for name, value in of.items() if name != "both"} for of in inputs())
    [masks] = prune(pruner, weights, stats, [0.5], pattern="4:8")
    for name, mask in masks.items():
        groups, scores = (tensor.view(-1, 8) for tensor in (mask, pruner.score(weights[name], stats[name])))
        worst_kept = scores.masked_fill(~groups, torch.inf).amin(dim=1)
        assert (worst_kept >= scores.masked_fill(groups, -torch.inf).amax(dim=1)).all()


def test_a_pattern_that_does_not_fit_is_refused():
    pruner = PRUNERS["wanda"]
    with pytest.raises(ValueError, match="layer 'both'"):  # 10 inputs
        prune(pruner, *inputs(), [0.5], pattern="2:4")
    with pytest.raises(ValueError, match=r"pattern 1:4 must be 0.75, got 0.5"):
        prune(pruner, *inputs(), [0.75, 0.5], pattern="1:4")
    with pytest.raises(ValueError, match="a pattern must be N:M"):
        prune(pruner, *inputs(), [0.5], pattern="4:2")


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_schedule_ends_at_the_sparsity():
    assert schedule(0.75, 2) == [0.5, 0.75]
    levels = schedule(0.9, 7)
    assert levels == sorted(levels)
    assert levels[-1] == 0.9
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        schedule(0.5, 0)


@iterative
@pytest.mark.parametrize("ties", [False, True])
def test_steps_see_sparse_weights_and_never_revive_an_entry(pruner, ties):
    weights, stats = equal_inputs(0.0) if ties else inputs()
    dense = {name: weight.clone() for name, weight in weights.items()}
    seen = []

    def measure(current, step, layers=None):
        assert step == len(seen)
        seen.append({name: weight.clone() for name, weight in current.items()})
        return stats if ties else random_stats(seed=10 + step)

    three = pruner.with_options({"steps": 3})
    masks = search_masks(three, weights, measure, sparsity=0.75, modality=MODALITY)
    assert n_pruned(masks) == 1041
    assert len(seen) == 3
    assert all(torch.equal(seen[0][name], dense[name]) for name in SHAPES)
    assert all(torch.equal(weights[name], dense[name]) for name in SHAPES)
    if not ties:
        for level, before, after in zip(schedule(0.75, 3), seen, seen[1:]):
            assert all((after[name][before[name] == 0] == 0).all() for name in SHAPES)
            assert sum(int((weight == 0).sum()) for weight in after.values()) == round(level * 1388)


@iterative
def test_more_survivors_than_alive_are_refused(pruner):
    alive = {name: torch.arange(n_out * n_in).view(n_out, n_in) % 2 == 0 for name, (n_out, n_in) in SHAPES.items()}
    with pytest.raises(ValueError, match=r"sparsity 0.3 keeps more entries than the 694 of 1388 that are alive"):
        prune(pruner, *equal_inputs(0.0), [0.3], alive=alive)


def test_methods_with_layer_counts_do_not_prune_in_steps():
    for name in ("localmp", "multiflow"):
        with pytest.raises(ValueError, match=f"method '{name}' cannot prune in steps"):
            iterate(PRUNERS[name], random_weights(), always(random_stats()), sparsity=0.5, modality=MODALITY)


def always(stats):
    return lambda current, step, layers=None: stats


def test_one_step_is_the_one_shot_method():
    for steps, shot in (("itersnip", "snip"), ("chita++", "chita")):
        once = get_pruner(steps, {"steps": 1})
        stepped = search_masks(once, random_weights(), always(random_stats()), sparsity=0.63, modality=MODALITY)
        assert_equal(stepped, prune(PRUNERS[shot], *inputs(), [0.63])[0])


# --- by hand --------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([[3.0, -4.0], [0.0, 12.0]])


def test_random_depends_on_seed_and_layer_and_on_nothing_else():
    weights, pruner = random_weights(), PRUNERS["random"]
    [masks] = prune(pruner, weights, {}, [0.5], seed=1)
    [other_seed] = prune(pruner, weights, {}, [0.5], seed=2)
    assert not torch.equal(masks["words"], other_seed["words"])
    assert layer_seed(1, "eyes.0") != layer_seed(1, "eyes.1")
    score = partial(pruner.score, stats={"seed": torch.tensor(layer_seed(1, "words"))})
    assert torch.equal(score(weights["words"]), score(weights["words"] * 2))
    assert 0 <= score(weights["words"]).min() <= score(weights["words"]).max() < 1


def test_omp_prunes_the_smallest_of_the_model_and_localmp_of_each_layer():
    weights = {"eyes.0": WEIGHT, "words": WEIGHT / 100}
    omp, localmp = (prune(PRUNERS[name], weights, {}, [0.5])[0] for name in ("omp", "localmp"))
    assert omp["eyes.0"].tolist() == [[True, True], [False, True]]
    assert omp["words"].tolist() == [[False, False], [False, True]]
    assert localmp["eyes.0"].tolist() == localmp["words"].tolist() == [[False, True], [False, True]]


def test_l2_divides_by_the_norm_of_the_layer():
    score = PRUNERS["l2"].score(WEIGHT, {})
    torch.testing.assert_close(score, WEIGHT.abs() / 13)
    assert torch.equal(PRUNERS["l2"].score(torch.zeros(2, 2), {}), torch.zeros(2, 2))


def test_lamp_divides_by_the_squares_that_are_not_smaller():
    score = PRUNERS["lamp"].score(WEIGHT, {})
    torch.testing.assert_close(score, torch.tensor([[9 / 169, 16 / 160], [0.0, 1.0]]))
    equal = PRUNERS["lamp"].score(torch.ones(1, 4), {})  # in the order of the index
    torch.testing.assert_close(equal, torch.tensor([[1 / 4, 1 / 3, 1 / 2, 1.0]]))
    assert torch.equal(PRUNERS["lamp"].score(torch.zeros(2, 2), {}), torch.zeros(2, 2))


def test_lamp_does_not_cancel_in_a_large_layer():
    weight = torch.randn(500, 400, generator=torch.Generator().manual_seed(0)) * 0.03
    score = PRUNERS["lamp"].score(weight, {})
    assert score.max() == 1
    assert score.min() > 0
    order = weight.flatten().abs().argsort(stable=True)
    assert (score.flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_lamp_is_bit_by_bit_what_a_stable_sort_of_floats_gives(dtype):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(60, 70, generator=generator, dtype=torch.float64)
    tied = (4 * normal).round() / 4  # with zeros of both signs
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    special = torch.tensor([[0.0, -0.0, tiny / 2, -tiny / 2, tiny, largest, -largest, 1.0]], dtype=torch.float64)
    infinite = torch.tensor([[1.0, -float("inf"), 0.0, float("inf")]])
    unknown = torch.tensor([[1.0, float("nan"), float("inf"), -float("nan")]])
    for values in (normal, tied, special, special.flip(1), torch.zeros(3, 4), torch.ones(0, 4), infinite, unknown):
        weight = values.to(dtype, copy=True)
        magnitude, order = weight.flatten().abs().sort(stable=True)
        squares = magnitude.double().square()
        not_smaller = squares.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
        wanted = torch.empty_like(magnitude)
        wanted[order] = (squares / not_smaller).to(dtype)
        score = PRUNERS["lamp"].score(weight, {})
        assert score.dtype == dtype
        torch.testing.assert_close(score, wanted.view_as(weight), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(weight, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_snip_is_the_absolute_gradient_times_weight():
    grad = torch.tensor([[1.0, -0.5], [7.0, 0.25]])
    assert PRUNERS["snip"].score(WEIGHT, {"grad": grad}).tolist() == [[3.0, 2.0], [0.0, 3.0]]
    assert PRUNERS["itersnip"].score(WEIGHT, {"grad": grad}).tolist() == [[3.0, 2.0], [0.0, 3.0]]


def test_obd_is_half_the_curvature_times_the_squared_weight():
    grad_sq = torch.tensor([[1.0, 0.5], [7.0, 0.25]])
    assert PRUNERS["obd"].score(WEIGHT, {"grad_sq": grad_sq}).tolist() == [[4.5, 4.0], [0.0, 18.0]]


def test_multiflow_multiplies_the_edge_with_its_two_nodes():
    # Roots (2, 1): flow [[6, 4], [0, 12]], outputs (5, 6), inputs (3, 8).
    score = PRUNERS["multiflow"].score(WEIGHT, {"input_sq": torch.tensor([4.0, 1.0])})
    assert score.tolist() == [[5 * 3 * 3.0, 5 * 8 * 4.0], [0.0, 6 * 8 * 12.0]]


def test_multiflow_takes_layer_counts_from_magnitudes_within_the_modality():
    weights = {"eyes.0": WEIGHT, "eyes.1": WEIGHT / 100, "words": WEIGHT / 1000}
    [counts] = modality_prior(weights, {}, MODALITY, [0.5])
    assert counts == {"eyes.0": 1, "eyes.1": 3, "words": 2}
    # The scores decide within a layer: input 1 of eyes.0 is silent, so an edge of it goes and not the smallest one.
    stats = {name: {"input_sq": torch.tensor([1.0, 1.0])} for name in weights}
    stats["eyes.0"]["input_sq"] = torch.tensor([1.0, 0.0])
    weights["eyes.0"] = torch.tensor([[3.0, -4.0], [0.005, 12.0]])
    [masks] = prune(PRUNERS["multiflow"], weights, stats, [0.5])
    assert [int((~mask).sum()) for mask in masks.values()] == [1, 3, 2]
    assert masks["eyes.0"].tolist() == [[True, False], [True, True]]


def test_chita_without_first_order_term_keeps_the_largest_and_regresses():
    # One row (1, 1, 0), d = 0.5, w = (2, 1, 0.5): keep 0 and 1 -> nothing moves; keep 0 -> b = (3 + 2) / 2.
    w, rows, none = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(3)
    torch.testing.assert_close(solve(w, rows, 2, none, 0.5, [0, 3]), torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close(solve(w, rows, 1, none, 0.5, [0, 3]), torch.tensor([2.0, 0.0, 0.0]) + 0.5 * (w > 1.5))


def test_chita_shifts_by_the_first_order_term():
    # No rows that matter: 0.5 |b - w|^2 + alpha b has its minimum at w - alpha.
    w, alpha = torch.tensor([2.0, -1.0, 0.1]), torch.tensor([0.5, 0.25, 0.0])
    beta = solve(w, torch.zeros(1, 3), 2, alpha, 0.5, [0, 3])
    torch.testing.assert_close(beta, torch.tensor([1.5, -1.25, 0.0]))


def test_chita_takes_the_first_order_term_from_its_rows():
    weights = {"a": torch.tensor([[2.0, -1.0]])}
    stats = {"a": {"grad_rows": torch.tensor([[0.4, 0.0], [0.0, 0.4]]), "row_size": torch.tensor(4.0)}}
    masks = chita_update(weights, stats, n_pruned=0, alive=None, options=ChitaOptions(lam=1.0))
    # Damping 1, alpha (0.1, 0.1): both columns minimize 0.08 (b - w)^2 + (b - w)^2 + 0.1 b.
    torch.testing.assert_close(masks.weights["a"], weights["a"] - 0.1 / 2.16)


def test_chita_tells_a_survivor_at_zero_from_a_pruned_entry():
    w = torch.tensor([1.0, 0.1])
    beta, support = solve_support(w, torch.zeros(1, 2), 1, torch.tensor([1.0, 0.0]), 0.5, [0, 2])
    assert int(support.sum()) == 1
    beta, support = solve_support(torch.zeros(4), torch.zeros(1, 4), 2, torch.zeros(4), 0.5, [0, 4])
    assert support.tolist() == [False, False, True, True]
    assert beta.tolist() == [0.0] * 4


def dense_optimum(w, rows, alpha, damping, support):
    """The minimum of the objective on a support, from its normal equations over all columns."""
    hessian = rows.T @ rows + 2 * damping * torch.eye(len(w), dtype=w.dtype)
    target = (hessian @ w - alpha)[support]
    beta = torch.zeros_like(w)
    beta[support] = torch.linalg.solve(hessian[support][:, support], target)
    return beta


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 12), st.floats(-4, 1), st.booleans(), st.data())
def test_chita_is_the_exact_minimum_on_its_support(seed, p, n, log_damping, first_order, data):
    generator = torch.Generator().manual_seed(seed)
    w, alpha = torch.randn(2, p, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    alpha = alpha if first_order else torch.zeros_like(alpha)
    n_keep = data.draw(st.integers(0, p))
    boundaries = sorted({0, p, *data.draw(st.lists(st.integers(0, p), max_size=3))})
    beta, support = solve_support(w, rows, n_keep, alpha, 10**log_damping, boundaries)
    assert int(support.sum()) == n_keep
    assert (beta[~support] == 0).all()
    for start, end in pairwise(boundaries):
        part = slice(start, end)
        wanted = dense_optimum(w[part], rows[:, part], alpha[part], 10**log_damping, support[part])
        torch.testing.assert_close(beta[part], wanted, rtol=1e-6, atol=1e-6 * max(1, 10**-log_damping))
    if not first_order:  # the support is then the largest weights
        assert set(w.abs().argsort(descending=True)[:n_keep].tolist()) == set(support.nonzero().flatten().tolist())


def test_chita_refuses_what_it_cannot_solve():
    w, rows, alpha = torch.ones(4), torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"blocks must rise from 0 to 4, got \[0, 3\]"):
        solve(w, rows, 2, alpha, 0.1, [0, 3])
    with pytest.raises(ValueError, match="cannot keep 5 of 4 entries"):
        solve(w, rows, 5, alpha, 0.1, [0, 4])
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        solve(w, rows, 2, alpha, 0.0, [0, 4])
    stats = {name: {"grad_rows": torch.ones(n, 4), "row_size": torch.tensor(1.0)} for name, n in (("a", 2), ("b", 3))}
    with pytest.raises(ValueError, match=r"as many rows in 'grad_rows', got \{'a': 2, 'b': 3\}"):
        prune(PRUNERS["chita"], {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, stats, [0.5])


def test_chita_blocks_of_length_zero_change_nothing():
    generator = torch.Generator().manual_seed(0)
    w, alpha = torch.randn(2, 30, generator=generator)
    rows = torch.randn(4, 30, generator=generator)
    whole = solve(w, rows, 9, alpha, 0.1, [0, 10, 30])
    assert torch.equal(whole, solve(w, rows, 9, alpha, 0.1, [0, 0, 10, 10, 10, 30, 30]))


def test_blocks_are_near_the_asked_size():
    assert block_boundaries(9_999) == [0, 9_999]
    assert block_boundaries(10_000) == [0, 10_000]
    assert block_boundaries(25, block=10) == [0, 12, 25]
