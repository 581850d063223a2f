"""Mask training, and the two defects of the reference that it does not have."""

import pytest
import torch

from vlprune.pruners import PRUNERS, get_pruner, prune_masks, search_masks
from vlprune.pruners.tamt import first_variables

TAMT = PRUNERS["tamt"]
SHAPES = {"a": (8, 12), "b": (16, 8), "c": (4, 4)}


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


def search(weights, measure, sparsity, steps):
    return search_masks(get_pruner("tamt", {"steps": steps}), weights, measure, sparsity=sparsity, modality={})


def n_pruned(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def test_the_first_variables_are_twice_the_global_threshold_where_the_layer_keeps():
    weights = {"a": torch.tensor([[1.0, -2.0], [3.0, 4.0]]), "b": torch.tensor([[10.0, 20.0], [30.0, 40.0]])}
    variables = first_variables(weights, n_pruned=4)  # the four smallest are those of a, the largest of them is 4
    assert {name: value.tolist() for name, value in variables.items()} == {
        "a": [[0.0, 0.0], [8.0, 8.0]],
        "b": [[0.0, 0.0], [8.0, 8.0]],
    }


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
@pytest.mark.parametrize("steps", [1, 5])
def test_without_gradients_it_is_magnitude_within_layers(sparsity, steps):
    weights = random_weights()
    none = {name: {"grad": torch.zeros_like(weight)} for name, weight in weights.items()}
    masks = search(weights, lambda current, step: none, sparsity, steps)
    [localmp] = prune_masks(PRUNERS["localmp"], weights, {}, sparsities=[sparsity], modality={})
    assert all(torch.equal(masks[name], localmp[name]) for name in weights)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.63, 0.9])
def test_every_step_prunes_exactly_and_the_first_does_not_mask_the_network(sparsity):
    weights, seen = random_weights(), []
    n_edges = sum(weight.numel() for weight in weights.values())

    def measure(current, step):
        assert step == len(seen)
        seen.append({name: value == 0 for name, value in current.items()})
        assert all(((current[name] == weight) | (current[name] == 0)).all() for name, weight in weights.items())
        generator = torch.Generator().manual_seed(step)
        return {name: {"grad": torch.randn(shape, generator=generator)} for name, shape in SHAPES.items()}

    masks = search(weights, measure, sparsity, steps=6)
    assert len(seen) == 6
    assert [n_pruned({name: ~zero for name, zero in zeros.items()}) for zeros in seen] == [
        round(sparsity * n_edges)
    ] * 6
    assert n_pruned(masks) == round(sparsity * n_edges)
    assert masks.weights is None
    if sparsity:
        assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in weights)


def test_a_pruned_entry_that_the_loss_wants_returns():
    # A linear model whose target uses the smallest weight and does not use the larger one beside it.
    weight = torch.tensor([[0.01, 0.02, 0.05, 0.06]])
    inputs = torch.eye(4)
    target = torch.tensor([[0.01], [0.0], [0.05], [0.06]])

    def measure(current, step):
        error = inputs @ current["a"].T - target
        return {"a": {"grad": error.T @ inputs}}

    [localmp] = prune_masks(PRUNERS["localmp"], {"a": weight}, {}, sparsities=[0.25], modality={})
    assert localmp["a"].tolist() == [[False, True, True, True]]
    masks = search({"a": weight}, measure, 0.25, steps=200)
    assert masks["a"].tolist() == [[True, False, True, True]]


def test_the_length_of_the_path_does_not_depend_on_the_number_of_steps():
    # With a gradient of one sign Adam moves a variable by the rate: 5e-5 * 3001 / 2 in all, 0.075, of a decaying rate.
    # The threshold is 0.01: the kept entries start at 0.02 and fall, the pruned ones stay at 0.
    weights = {"a": torch.tensor([[0.01, 0.02, 0.03, 0.04]])}
    for steps in (1, 2, 30):
        for start, crosses in ((0.02, True), (0.08, False)):
            scaled = {"a": weights["a"] * (start / 0.02)}
            falling = {"a": {"grad": torch.tensor([[0.0, 0.0, 0.0, 1.0]])}}
            masks = search(scaled, lambda current, step, falling=falling: falling, 0.25, steps)
            assert (not masks["a"][0, 3]) == crosses


def test_given_gradients_are_one_step():
    weights = random_weights()
    generator = torch.Generator().manual_seed(1)
    stats = {name: {"grad": torch.randn(shape, generator=generator)} for name, shape in SHAPES.items()}
    [masks] = prune_masks(TAMT, weights, stats, sparsities=[0.63], modality={})
    stepped = search(weights, lambda current, step: stats, 0.63, steps=1)
    assert all(torch.equal(masks[name], stepped[name]) for name in weights)
    with pytest.raises(ValueError, match="method 'tamt' cannot prune in steps: its pruned entries may come back"):
        prune_masks(TAMT, weights, stats, sparsities=[0.63], modality={}, alive=masks)
