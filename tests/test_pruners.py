"""One contract for every method of PRUNERS, and one case worked by hand for each."""

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.config import CalibrationConfig
from vlprune.masks import sparsity as measured
from vlprune.pruners import PRUNERS, STATISTICS, STEPS, Pruner, get_pruner, iterate, prune_masks, schedule
from vlprune.pruners.chita import block_boundaries, chita_update, solve, solve_support
from vlprune.pruners.multiflow import modality_prior
from vlprune.pruners.pruner import layer_seed

SHAPES = {"eyes.0": (24, 16), "eyes.1": (16, 24), "words": (8, 40), "both": (30, 10)}
MODALITY = {"eyes.0": "vision", "eyes.1": "vision", "words": "text", "both": "fusion"}
SPARSITIES = [0.0, 0.63, 0.75, 0.9, 0.999]
N_ROWS = 5
MOVE_WEIGHTS = {"chita", "chita++", "sparsegpt"}

every_pruner = pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS.keys())
score_based = pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if p.score], ids=lambda p: p.name)
searching = pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if p.search], ids=lambda p: p.name)
with_pattern = pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if p.takes_pattern], ids=lambda p: p.name)
without_pattern = pytest.mark.parametrize(
    "pruner", [p for p in PRUNERS.values() if not p.takes_pattern], ids=lambda p: p.name
)
iterative = pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if p.search is STEPS], ids=lambda p: p.name)


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = {"eyes.0": 0.05, "eyes.1": 0.02, "words": 0.1, "both": 0.03}
    return {name: torch.randn(shape, generator=generator) * scales[name] for name, shape in SHAPES.items()}


def random_stats(seed=1):
    generator = torch.Generator().manual_seed(seed)
    stats = {}
    for name, (n_out, n_in) in SHAPES.items():
        rows = torch.randn(N_ROWS, n_out * n_in, generator=generator) * 0.1
        grad = rows.mean(dim=0).view(n_out, n_in)
        stats[name] = {"input_sq": torch.rand(n_in, generator=generator) * 50, "grad": grad, "grad_rows": rows}
        stats[name]["row_size"] = torch.tensor(8.0)
        inputs = torch.randn(40, n_in, generator=generator)
        stats[name]["input_outer"] = inputs.T @ inputs
        stats[name]["grad_sq"] = rows.square().mean(dim=0).view(n_out, n_in)
        stats[name]["zo_grad"] = torch.rand((), generator=generator)
    return stats


def inputs():
    return random_weights(), random_stats()


def full(value):
    weights = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    stats = {
        name: {
            "input_sq": torch.full((n_in,), value),
            "grad": torch.full((n_out, n_in), value),
            "grad_rows": torch.full((N_ROWS, n_out * n_in), value),
            "row_size": torch.tensor(8.0),
            "grad_sq": torch.full((n_out, n_in), value),
            "input_outer": torch.full((n_in, n_in), value),
            "zo_grad": torch.tensor(value),
        }
        for name, (n_out, n_in) in SHAPES.items()
    }
    return weights, stats


def prune(pruner, weights, stats, sparsities=SPARSITIES, **more):
    return prune_masks(pruner, weights, stats, sparsities=sparsities, modality=MODALITY, **more)


def assert_well_formed(masks, sparsity):
    assert list(masks) == list(SHAPES)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert tuple(mask.shape) == SHAPES[name]
        if masks.weights is not None:
            assert masks.weights[name].shape == mask.shape
            assert masks.weights[name].dtype == torch.float32
            assert masks.weights[name].isfinite().all()
            assert (masks.weights[name][~mask] == 0).all()
    n_edges = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * n_edges)
    assert measured(masks) == pytest.approx(round(sparsity * n_edges) / n_edges)


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
def test_counts_shapes_and_types(pruner):
    for sparsity, masks in zip(SPARSITIES, prune(pruner, random_weights(), random_stats())):
        assert_well_formed(masks, sparsity)


@every_pruner
def test_only_methods_that_move_weights_give_weights(pruner):
    [masks] = prune(pruner, random_weights(), random_stats(), [0.63])
    assert (masks.weights is not None) == (pruner.name in MOVE_WEIGHTS)


@every_pruner
def test_the_same_inputs_give_the_same_masks_and_stay_as_they_are(pruner):
    weights, stats = random_weights(), random_stats()
    first = prune(pruner, weights, stats, seed=3)
    for a, b in zip(first, prune(pruner, weights, stats, seed=3)):
        assert_equal(a, b)
    assert all(torch.equal(weights[name], value) for name, value in random_weights().items())
    for name, of_layer in random_stats().items():
        assert stats[name].keys() == of_layer.keys()
        assert all(torch.equal(stats[name][key], value) for key, value in of_layer.items())


@every_pruner
def test_sparsities_asked_together_are_those_asked_alone(pruner):
    weights, stats = random_weights(), random_stats()
    for sparsity, masks in zip(SPARSITIES, prune(pruner, weights, stats)):
        assert_equal(masks, prune(pruner, weights, stats, [sparsity])[0])


@every_pruner
def test_parameters_that_require_gradients_are_taken(pruner):
    parameters = {name: torch.nn.Parameter(weight) for name, weight in random_weights().items()}
    [masks] = prune(pruner, parameters, random_stats(), [0.63])
    assert_equal(masks, prune(pruner, random_weights(), random_stats(), [0.63])[0])


@score_based
def test_a_higher_sparsity_revives_nothing(pruner):
    masks = prune(pruner, random_weights(), random_stats())
    for lower, higher in pairwise(masks):
        assert all((higher[name] <= lower[name]).all() for name in SHAPES)


@every_pruner
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_ties_and_zeros_do_not_change_the_count(pruner, value):
    for sparsity, masks in zip(SPARSITIES, prune(pruner, *full(value))):
        assert_well_formed(masks, sparsity)


@every_pruner
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_layer(pruner, bad):
    weights = random_weights()
    weights["words"][2, 3] = bad
    with pytest.raises(ValueError, match="layer 'words': weights must be finite"):
        prune(pruner, weights, random_stats())


@every_pruner
def test_statistics_that_are_missing_misshaped_or_not_finite_are_refused(pruner):
    for need in pruner.needs:
        stats = random_stats()
        del stats["words"][need]
        with pytest.raises(ValueError) as error:  # noqa: PT011
            prune(pruner, random_weights(), stats)
        assert str(error.value).startswith(
            f"method '{pruner.name}' needs the statistic '{need}' of layer 'words'; got: "
        )
        stats["words"][need] = torch.zeros(3, 3)
        with pytest.raises(ValueError, match=f"layer 'words': statistic '{need}' must have shape"):
            prune(pruner, random_weights(), stats)
        stats = random_stats()
        stats["words"][need].view(-1)[-1] = float("nan")
        with pytest.raises(ValueError, match=r"layer 'words': .* must be finite"):
            prune(pruner, random_weights(), stats)


@every_pruner
@pytest.mark.parametrize("sparsity", [-0.5, 1.0, 63.0])
def test_sparsities_outside_their_range_are_refused(pruner, sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        prune(pruner, random_weights(), random_stats(), [sparsity])


@every_pruner
def test_a_method_needs_nothing_but_what_it_says(pruner):
    stats = {name: {need: of_layer[need] for need in pruner.needs} for name, of_layer in random_stats().items()}
    [masks] = prune(pruner, random_weights(), stats, [0.75])
    assert_equal(masks, prune(pruner, random_weights(), random_stats(), [0.75])[0])


def test_an_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"unknown method 'multflow'; did you mean 'multiflow'\? There are: random, omp"
    ):
        get_pruner("multflow")
    with pytest.raises(ValueError, match=r"unknown method 'xyz'. There are: random, omp"):
        get_pruner("xyz")
    assert get_pruner("chita++") is PRUNERS["chita++"]


def test_a_pruner_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="method 'x' must have either a score or an update"):
        Pruner(name="x", source="")
    with pytest.raises(
        ValueError, match=r"unknown statistics \['hessian'\]; there are: input_sq, grad, grad_rows, row_size"
    ):
        replace(PRUNERS["snip"], needs=frozenset({"hessian"}))
    assert set().union(*(pruner.needs for pruner in PRUNERS.values())) <= set(STATISTICS)


# --- patterns -------------------------------------------------------------------------------------------------------


@with_pattern
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_a_pattern_keeps_n_of_every_m_inputs(pruner, pattern):
    weights, stats = ({name: value for name, value in of.items() if name != "both"} for of in inputs())
    n, m = (int(number) for number in pattern.split(":"))
    [masks] = prune(pruner, weights, stats, [0.5], pattern=pattern)
    scores = {name: pruner.score(weights[name], {**stats[name], "seed": torch.tensor(0)}) for name in weights}
    for name, mask in masks.items():
        groups = mask.view(len(mask), -1, m)
        assert (groups.sum(dim=2) == n).all()
        if pruner.name != "random":
            of = scores[name].view(groups.shape)
            worst_kept = of.masked_fill(~groups, torch.inf).amin(dim=2)
            assert (worst_kept >= of.masked_fill(groups, -torch.inf).amax(dim=2)).all()


@with_pattern
def test_a_pattern_that_does_not_fit_is_refused(pruner):
    with pytest.raises(ValueError, match="layer 'both'"):  # 10 inputs
        prune(pruner, *inputs(), [0.5], pattern="2:4")
    with pytest.raises(ValueError, match=r"the sparsity of pattern 1:4 must be 0.75, got 0.5"):
        prune(pruner, *inputs(), [0.75, 0.5], pattern="1:4")
    with pytest.raises(ValueError, match="a pattern must be N:M"):
        prune(pruner, *inputs(), [0.5], pattern="4:2")


@without_pattern
def test_other_methods_refuse_a_pattern(pruner):
    with pytest.raises(ValueError, match=rf"method '{re.escape(pruner.name)}' takes no pattern: only methods that"):
        prune(pruner, *inputs(), [0.5], pattern="1:2")


# --- searches -------------------------------------------------------------------------------------------------------


@searching
@pytest.mark.parametrize("sparsity", [0.0, 0.63, 0.75, 0.999])
def test_a_search_prunes_exactly_and_leaves_the_weights(pruner, sparsity):
    def search():
        weights = random_weights()
        steps, _ = pruner.search.plan(CalibrationConfig(steps=2, step_batches=2))
        masks = pruner.search.run(pruner, weights, measure, sparsity=sparsity, steps=steps, modality=MODALITY, seed=0)
        assert all(torch.equal(weights[name], weight) for name, weight in random_weights().items())
        return masks

    def measure(current, step, layers=None):
        assert list(current) == list(SHAPES)
        stats = random_stats(seed=20 + step)
        return {name: {need: stats[name][need] for need in pruner.needs} for name in layers or SHAPES}

    masks = search()
    assert_well_formed(masks, sparsity)
    assert_equal(masks, search())


@searching
def test_a_search_refuses_statistics_that_are_missing(pruner):
    with pytest.raises(
        ValueError, match=rf"method '{re.escape(pruner.name)}' needs the statistic '\w+' of layer 'eyes.0'"
    ):
        pruner.search.run(
            pruner,
            random_weights(),
            lambda current, step, layers=None: {},
            sparsity=0.5,
            steps=1,
            modality=MODALITY,
            seed=0,
        )


def test_a_search_plans_its_batches():
    calibration = CalibrationConfig(n_batches=5, steps=3, step_batches=2)
    plans = {name: pruner.search.plan(calibration) for name, pruner in PRUNERS.items() if pruner.search}
    assert plans == {"itersnip": (3, 2), "chita++": (3, 2), "sparsegpt": (1, 5), "tamt": (6, 1)}


# --- steps ----------------------------------------------------------------------------------------------------------


def test_schedules_end_at_the_sparsity():
    assert schedule(0.75, 2) == [0.5, 0.75]
    assert schedule(0.6, 3, "linear") == pytest.approx([0.2, 0.4, 0.6])
    assert schedule(0.6, 2, "const") == [0.6, 0.6]
    for kind in ("exp", "linear", "const"):
        levels = schedule(0.9, 7, kind)
        assert levels == sorted(levels)
        assert levels[-1] == 0.9
    with pytest.raises(ValueError, match="unknown schedule 'cubic'; there are: exp, linear, const"):
        schedule(0.5, 3, "cubic")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        schedule(0.5, 0)


@iterative
@pytest.mark.parametrize("kind", ["exp", "linear", "const"])
@pytest.mark.parametrize("ties", [False, True])
def test_steps_see_sparse_weights_and_never_revive_an_entry(pruner, kind, ties):
    weights, stats = full(0.0) if ties else (random_weights(), random_stats())
    dense = {name: weight.clone() for name, weight in weights.items()}
    seen = []

    def collect(current, step):
        assert step == len(seen)
        seen.append({name: weight.clone() for name, weight in current.items()})
        return stats if ties else random_stats(seed=10 + step)

    masks = iterate(pruner, weights, collect, sparsity=0.75, steps=3, modality=MODALITY, kind=kind)
    assert_well_formed(masks, 0.75)
    assert len(seen) == 3
    assert all(torch.equal(seen[0][name], dense[name]) for name in SHAPES)
    assert all(torch.equal(weights[name], dense[name]) for name in SHAPES)
    if not ties:
        for level, before, after in zip(schedule(0.75, 3, kind), seen, seen[1:]):
            assert all((after[name][before[name] == 0] == 0).all() for name in SHAPES)
            n_edges = sum(weight.numel() for weight in weights.values())
            assert sum(int((weight == 0).sum()) for weight in after.values()) == round(level * n_edges)


@iterative
def test_dead_entries_stay_dead_even_when_all_scores_are_equal(pruner):
    weights, stats = full(0.0)
    generator = torch.Generator().manual_seed(0)
    alive = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    [masks] = prune(pruner, weights, stats, [0.75], alive=alive)
    assert_well_formed(masks, 0.75)
    assert all((masks[name] <= alive[name]).all() for name in SHAPES)
    with pytest.raises(ValueError, match=r"sparsity 0.3 keeps more entries than the .* that are alive"):
        prune(pruner, weights, stats, [0.3], alive=alive)


def test_methods_with_layer_counts_do_not_prune_in_steps():
    for name in ("localmp", "multiflow"):
        with pytest.raises(ValueError, match=f"method '{name}' cannot prune in steps"):
            iterate(
                PRUNERS[name],
                random_weights(),
                lambda current, step: random_stats(),
                sparsity=0.5,
                steps=2,
                modality=MODALITY,
            )


def test_one_step_is_the_one_shot_method():
    for steps, shot in (("itersnip", "snip"), ("chita++", "chita")):
        stepped = iterate(
            PRUNERS[steps],
            random_weights(),
            lambda current, step: random_stats(),
            sparsity=0.63,
            steps=1,
            modality=MODALITY,
        )
        assert_equal(stepped, prune(PRUNERS[shot], random_weights(), random_stats(), [0.63])[0])


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
    masks = chita_update(weights, stats, n_pruned=0, alive=None, lam=1.0)
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
