"""Wanda's scores and ECoFLaP's layer counts, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.pruners import PRUNERS, prune_masks
from vlprune.pruners.wanda import zeroth_order_counts

WEIGHT = torch.tensor([[3.0, -4.0], [1.0, 12.0]])


def counts(sizes, importance, sparsity):
    weights = {name: torch.ones(shape) for name, shape in sizes.items()}
    stats = {name: {"zo_grad": torch.tensor(value)} for name, value in importance.items()}
    return zeroth_order_counts(weights, stats, {}, [sparsity])[0]


def test_wanda_multiplies_with_the_norm_of_the_input_and_prunes_every_row():
    stats = {"a": {"input_sq": torch.tensor([4.0, 1.0])}}
    assert PRUNERS["wanda"].score(WEIGHT, stats["a"]).tolist() == [[6.0, 4.0], [2.0, 12.0]]
    [masks] = prune_masks(PRUNERS["wanda"], {"a": WEIGHT}, stats, sparsities=[0.5], modality={})
    assert masks["a"].tolist() == [[True, False], [False, True]]


def test_ecoflap_splits_what_is_not_sure_by_importance():
    # Of 100 entries each 40 are sure at s = 0.5; of the other 20 three quarters go to the block 3 times as important.
    sizes = {"a.0.q": (10, 10), "b.0.q": (10, 10)}
    assert counts(sizes, {"a.0.q": 3.0, "b.0.q": 1.0}, 0.5) == {"a.0.q": 45, "b.0.q": 55}
    # At 0.95 none are sure.
    assert counts(sizes, {"a.0.q": 4.0, "b.0.q": 1.0}, 0.95) == {"a.0.q": 92, "b.0.q": 98}


def test_ecoflap_adds_the_importance_of_a_block_and_spreads_its_count_over_its_layers():
    sizes = {"a.0.q": (10, 5), "a.0.v": (5, 10), "b.0.q": (10, 10)}
    allocation = counts(sizes, {"a.0.q": 2.0, "a.0.v": 1.0, "b.0.q": 1.0}, 0.5)
    assert allocation == {"a.0.q": 23, "a.0.v": 22, "b.0.q": 55}


def test_ecoflap_gives_a_full_blocks_surplus_to_the_others():
    # a has 4 entries and keeps 1.6 for sure; its importance asks for far more than it has room for.
    sizes = {"a.0": (2, 2), "b.0": (10, 10), "c.0": (10, 10)}
    assert counts(sizes, {"a.0": 1000.0, "b.0": 3.0, "c.0": 1.0}, 0.5) == {"a.0": 0, "b.0": 47, "c.0": 55}


def test_ecoflap_without_importance_prunes_all_blocks_alike():
    sizes = {"a.0": (2, 10), "b.0": (10, 10)}
    assert counts(sizes, {"a.0": 0.0, "b.0": 0.0}, 0.75) == {"a.0": 15, "b.0": 75}


def test_ecoflap_shares_the_count_of_a_layer_by_its_rows():
    weights = {"a.0": torch.tensor([[1.0, 2.0, 3.0, 4.0], [40.0, 30.0, 20.0, 10.0]]), "b.0": torch.ones(2, 4)}
    stats = {name: {"input_sq": torch.ones(4), "zo_grad": torch.tensor(0.0)} for name in weights}
    pruner = PRUNERS["ecoflap"]
    for sparsity, wanted in ((0.5, [[0, 0, 1, 1], [1, 1, 0, 0]]), (0.375, [[0, 0, 1, 1], [1, 1, 1, 0]])):
        [masks] = prune_masks(pruner, weights, stats, sparsities=[sparsity], modality={})
        assert masks["a.0"].int().tolist() == wanted


def test_ecoflap_refuses_importance_that_is_none():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"layer 'a.0': 'zo_grad' of its block must be finite and at least 0"):
            counts({"a.0": (2, 2), "b.0": (2, 2)}, {"a.0": bad, "b.0": 1.0}, 0.5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.data(),
    st.floats(0, 0.9999),
)
def test_ecoflap_counts_are_exact_and_no_block_goes_beyond_its_headroom(shapes, data, sparsity):
    names = [f"block.{i // 2}.{i}.x" for i in range(len(shapes))]
    importance = data.draw(st.lists(st.floats(0, 2.0**100, width=32), min_size=len(names), max_size=len(names)))
    allocation = counts(dict(zip(names, shapes)), dict(zip(names, importance)), sparsity)
    sizes = {name: n_out * n_in for name, (n_out, n_in) in zip(names, shapes)}
    assert list(allocation) == names
    assert sum(allocation.values()) == round(sparsity * sum(sizes.values()))
    for name in names:
        assert 0 <= allocation[name] <= sizes[name]
        # A block has its headroom up to the rounding of the total and its own, a layer also its rounding.
        assert allocation[name] <= min(1, sparsity + 0.1) * sizes[name] + 3
