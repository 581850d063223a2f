"""SparseGPT against the exact solution of its quadratic problem, and the order in which the layers are pruned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.pruners import PRUNERS, prune_masks, search_masks
from vlprune.pruners.layerwise import blocks, layer_counts
from vlprune.pruners.sparsegpt import BLOCK, DAMPING

SPARSEGPT = PRUNERS["sparsegpt"]


def prune(weight, outer, sparsity):
    """The mask and the values of one layer."""
    stats = {"a": {"input_outer": outer}}
    [masks] = prune_masks(SPARSEGPT, {"a": weight}, stats, sparsities=[sparsity], modality={})
    return masks["a"], masks.weights["a"]


def damped(outer):
    return outer.double() + DAMPING * outer.double().diagonal().mean() * torch.eye(len(outer), dtype=torch.float64)


def error(values, weight, hessian):
    moved = (values - weight).double()
    return float((moved @ hessian * moved).sum())


def dense_optimum(weight, hessian, mask):
    """The least error on a mask, row by row from the normal equations."""
    values = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        target = hessian[kept] @ weight[row].double()
        values[row, kept] = torch.linalg.solve(hessian[kept][:, kept], target)
    return values


def correlated(n_in, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * n_in, n_in, generator=generator) @ torch.randn(n_in, n_in, generator=generator)
    return inputs.T @ inputs


def test_two_inputs_by_hand():
    # H = ((1 + d, 1), (1, 1 + d)), d = 0.01: without w_1, w_2 becomes w_2 + w_1 H_12 / H_22. The first saliency is
    # w_1^2 / (H^-1)_11 = 0.0199 w_1^2, the last one is 1.01 w_2^2: equal inputs make the first entry worth little.
    mask, values = prune(torch.tensor([[3.0, 1.0]]), torch.ones(2, 2), 0.5)
    assert mask.tolist() == [[False, True]]
    torch.testing.assert_close(values, torch.tensor([[0.0, 1 + 3 / 1.01]]))


def test_without_correlation_it_is_the_norm_times_the_weight_and_nothing_moves():
    weight, outer = torch.tensor([[3.0, -4.0], [1.0, 12.0]]), torch.diag(torch.tensor([4.0, 1.0]))
    mask, values = prune(weight, outer, 0.5)  # 6, 4, 2, 12 up to the damping
    assert mask.tolist() == [[True, False], [False, True]]
    torch.testing.assert_close(values, weight * mask)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12), st.floats(0, 0.99))
def test_the_error_is_between_the_exact_minimum_and_that_of_the_loss(seed, n_out, n_in, sparsity):
    outer = correlated(n_in, seed)
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed + 1))
    mask, values = prune(weight, outer, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    assert (values[~mask] == 0).all()
    least = error(dense_optimum(weight, damped(outer), mask), weight, damped(outer))
    assert error(values, weight, damped(outer)) >= least - 1e-5 * (1 + least)
    # Where all that is pruned lies left of all that is kept, the columns to the right make up for it exactly.
    for row in range(n_out):
        if (mask[row].int().diff() >= 0).all():
            exact = dense_optimum(weight[row : row + 1], damped(outer), mask[row : row + 1])
            torch.testing.assert_close(values[row : row + 1].double(), exact, rtol=1e-3, atol=1e-3)


def test_the_update_lowers_the_error_of_the_mask_alone():
    ours = alone = least = 0.0
    for seed in range(40):
        outer = correlated(32, seed)
        weight = torch.randn(4, len(outer), generator=torch.Generator().manual_seed(seed + 1))
        mask, values = prune(weight, outer, 0.5)
        ours += error(values, weight, damped(outer))
        alone += error(weight * mask, weight, damped(outer))
        least += error(dense_optimum(weight, damped(outer), mask), weight, damped(outer))
    assert least < ours < 0.7 * alone


def papers_algorithm(weight, outer, sparsity, block):
    """Mask and values as Frantar & Alistarh write it, in float64: a factor of the inverse, column after column."""
    factor = torch.linalg.cholesky(damped(outer).inverse(), upper=True)
    values, mask = weight.double(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, len(factor), block):
        span = range(start, min(start + block, len(factor)))
        saliency = (values[:, span] / factor.diagonal()[span]).square()
        mask[:, span] = saliency > saliency.flatten().kthvalue(round(sparsity * saliency.numel())).values
        for i in span:
            error = (values[:, i] / factor[i, i]).masked_fill(mask[:, i], 0.0)
            values[:, i:] -= error[:, None] * factor[i, i:]
    return mask, values * mask


def test_one_factor_of_the_hessian_gives_what_the_papers_factor_of_the_inverse_gives():
    weight = torch.randn(32, 3 * BLOCK, generator=torch.Generator().manual_seed(0))
    few = torch.randn(20, 3 * BLOCK, generator=torch.Generator().manual_seed(1)) + 2.0  # far fewer inputs than columns
    for outer in (correlated(3 * BLOCK, 0), few.T @ few):
        mask, values = prune(weight, outer, 0.75)
        wanted_mask, wanted = papers_algorithm(weight, outer, 0.75, BLOCK)
        assert torch.equal(mask, wanted_mask)
        torch.testing.assert_close(values, wanted.float())


def test_blocks_share_the_count_and_hand_their_errors_on():
    generator = torch.Generator().manual_seed(0)
    outer, weight = correlated(2 * BLOCK + 8, 0), torch.randn(3, 2 * BLOCK + 8, generator=generator)
    mask, values = prune(weight, outer, 0.5)
    assert [int((~part).sum()) for part in mask.split(BLOCK, dim=1)] == [192, 192, 12]
    assert error(values, weight, damped(outer)) < error(weight * mask, weight, damped(outer))
    assert not torch.equal(values[:, 2 * BLOCK :], weight[:, 2 * BLOCK :] * mask[:, 2 * BLOCK :])


def test_dead_inputs_go_first_and_those_that_stay_keep_their_values():
    outer = correlated(4, 0)
    outer[:, 1] = outer[1] = 0
    weight = torch.full((4, 4), 0.1)
    weight[:, 1] = 100.0
    mask, values = prune(weight, outer, 3 / 16)
    assert mask[:, 1].tolist() == [False, False, False, True]
    torch.testing.assert_close(values, weight * mask)
    mask, _ = prune(weight, outer, 0.5)
    assert not mask[:, 1].any()


def test_the_scale_of_the_inputs_does_not_count():
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    mask, values = prune(weight, correlated(12, 1), 0.5)
    scaled_mask, scaled_values = prune(weight, correlated(12, 1) * 1e-6, 0.5)
    assert torch.equal(mask, scaled_mask)
    torch.testing.assert_close(values, scaled_values)


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="layer 'a': 'input_outer' must be a sum of outer products"):
        prune(torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.5)
    with pytest.raises(ValueError, match="method 'sparsegpt' cannot prune in steps"):
        SPARSEGPT.update({"a": torch.ones(2, 2)}, {}, n_pruned=1, alive={"a": torch.ones(2, 2) > 0})


# --- layer by layer -------------------------------------------------------------------------------------------------

SHAPES = {"see.0.q": (6, 8), "see.0.mlp.fc1": (8, 8), "see.1.q": (5, 8), "out": (3, 8)}


def test_a_block_is_named_up_to_its_last_number():
    names = [
        "v.layers.0.attn.q",
        "v.layers.0.mlp.fc1",
        "v.layers.10.attn.q",
        "t.layer.0.x",
        "head",
        "v.layers.0.mlp.fc2",
    ]
    assert blocks(names) == {
        "v.layers.0": ["v.layers.0.attn.q", "v.layers.0.mlp.fc1", "v.layers.0.mlp.fc2"],
        "v.layers.10": ["v.layers.10.attn.q"],
        "t.layer.0": ["t.layer.0.x"],
        "head": ["head"],
    }


def test_counts_are_in_proportion_to_the_sizes():
    weights = {name: torch.zeros(1, size) for name, size in {"a": 10, "b": 5, "c": 5}.items()}
    assert layer_counts(weights, 13) == {"a": 7, "b": 3, "c": 3}  # 6.5, 3.25, 3.25
    assert layer_counts(weights, 0) == {"a": 0, "b": 0, "c": 0}
    assert layer_counts(weights, 20) == {"a": 10, "b": 5, "c": 5}


def test_every_block_is_measured_in_the_model_pruned_so_far():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    seen = []

    def measure(current, step, layers=None):
        seen.append((layers, {name for name, weight in current.items() if not torch.equal(weight, weights[name])}))
        # Every measurement gives other inputs.
        return {name: {"input_outer": correlated(8, len(seen))} for name in layers}

    masks = search_masks(SPARSEGPT, weights, measure, sparsity=0.7, modality={})
    assert seen == [
        (["see.0.q", "see.0.mlp.fc1"], set()),
        (["see.1.q"], {"see.0.q", "see.0.mlp.fc1"}),
        (["out"], {"see.0.q", "see.0.mlp.fc1", "see.1.q"}),
    ]
    assert list(masks) == list(weights)
    counts = layer_counts(weights, round(0.7 * 176))
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == counts
    third = {"out": {"input_outer": correlated(8, 3)}}
    alone = SPARSEGPT.update({"out": weights["out"]}, third, n_pruned=counts["out"], alive=None)
    assert torch.equal(alone.weights["out"], masks.weights["out"])


def test_with_equal_statistics_layer_by_layer_is_all_at_once():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    stats = {name: {"input_outer": correlated(8, i)} for i, name in enumerate(weights)}
    [at_once] = prune_masks(SPARSEGPT, weights, stats, sparsities=[0.63], modality={})
    stepwise = search_masks(SPARSEGPT, weights, lambda current, step, layers: stats, sparsity=0.63, modality={})
    assert all(torch.equal(at_once.weights[name], stepwise.weights[name]) for name in weights)
