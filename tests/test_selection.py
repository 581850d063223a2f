"""Exact selection against sorting everything."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune import selection
from vlprune.masks import pack_bits
from vlprune.pruners import PRUNERS
from vlprune.pruners.chita import solve
from vlprune.selection import (
    WITHIN,
    modality_counts,
    select,
    select_counts,
    select_counts_many,
    select_lowest,
    select_many,
    select_pattern,
)

MODALITY = {"a": "vision", "b": "text", "c": "vision", "d": "fusion"}
SPARSITIES = [0.0, 0.1, 0.29, 0.5, 0.63, 0.75, 0.9, 0.999]

# Few values, so that ties are everywhere: both zeros, denormals, extremes, neighbours at the edge of a radix bin.
EDGE = np.array([0x3F80FFFF, 0x3F810000, 0x3F810001], dtype=np.int32).view(np.float32).tolist()
LARGEST = torch.finfo(torch.float32).max
POSITIVE = [0.0, 1e-45, 1.1e-38, 1.2e-38, 1e-3, 1.0, *EDGE, 2.0**100, LARGEST]
VALUES = [*POSITIVE, *(-value for value in POSITIVE)]

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@st.composite
def scores(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    width = 32 if dtype == torch.float32 else 64
    values = draw(
        st.sampled_from([st.sampled_from(VALUES), st.floats(width=width, allow_nan=False, allow_infinity=False)])
    )
    drawn = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
        size = shape[0] * shape[1]
        drawn[name] = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    return drawn


def oracle(arrays, n_pruned):
    """Masks of one group, by a stable sort of all scores."""
    flat = np.concatenate([array.ravel() for array in arrays])
    keep = np.ones(len(flat), dtype=bool)
    keep[np.argsort(flat + 0.0, kind="stable")[:n_pruned]] = False
    ends = np.cumsum([array.size for array in arrays])[:-1]
    return [part.reshape(array.shape) for part, array in zip(np.split(keep, ends), arrays)]


@settings(max_examples=150, deadline=None)
@given(scores(), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4), st.sampled_from(WITHIN))
def test_select_prunes_exactly_the_asked_number_and_the_lowest_of_each_group(scores, sparsities, within):
    before = {name: values.clone() for name, values in scores.items()}
    total = sum(values.numel() for values in scores.values())
    for sparsity, kept in zip(sparsities, select_many(scores, sparsities, within, MODALITY)):
        assert list(kept) == list(scores)
        assert all(kept[n].dtype == torch.bool and kept[n].shape == scores[n].shape for n in scores)
        assert sum(int((~mask).sum()) for mask in kept.values()) == round(sparsity * total)
        rows = [(name, i) for name in scores for i in range(len(scores[name]))]
        groups = {
            "model": [[(name, i) for name, i in rows]],
            "modality": [[r for r in rows if MODALITY[r[0]] == m] for m in ("vision", "text", "fusion")],
            "layer": [[r for r in rows if r[0] == name] for name in scores],
            "row": [[r] for r in rows],
        }[within]
        for group in groups:
            if group:
                masks = [kept[name][i].numpy() for name, i in group]
                n_pruned = sum(int((~mask).sum()) for mask in masks)
                size = sum(mask.size for mask in masks)
                assert abs(n_pruned - sparsity * size) <= 1
                for mask, wanted in zip(masks, oracle([scores[name][i].numpy() for name, i in group], n_pruned)):
                    np.testing.assert_array_equal(mask, wanted)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


@settings(max_examples=60, deadline=None)
@given(scores(), st.data())
def test_select_lowest_and_counts_take_any_number(scores, data):
    sizes = {name: values.numel() for name, values in scores.items()}
    n_pruned = data.draw(st.integers(0, sum(sizes.values())))
    arrays = [values.numpy() for values in scores.values()]
    for mask, wanted in zip(select_lowest(scores, n_pruned).values(), oracle(arrays, n_pruned)):
        np.testing.assert_array_equal(mask.numpy(), wanted)
    allocations = [{name: data.draw(st.integers(0, size)) for name, size in sizes.items()} for _ in range(2)]
    for allocation, kept in zip(allocations, select_counts_many(scores, allocations)):
        for name in scores:
            [wanted] = oracle([scores[name].numpy()], allocation[name])
            np.testing.assert_array_equal(kept[name].numpy(), wanted)


@settings(max_examples=150, deadline=None)
@given(scores(), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
def test_counts_within_modalities_are_those_of_the_masks(scores, sparsities):
    counts = modality_counts(scores, sparsities, MODALITY)
    for pruned, kept in zip(counts, select_many(scores, sparsities, "modality", MODALITY), strict=True):
        assert pruned == {name: int((~mask).sum()) for name, mask in kept.items()}


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_chunks_give_what_one_gives(within, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randn(shape, generator=generator, dtype=dtype).mul(8).round() / 8
        for name, shape in (("a", (40, 70)), ("b", (33, 21)), ("c", (70, 40)))
    }
    scores["c"] = scores["c"].T  # not contiguous
    whole = select_many(scores, SPARSITIES, within, MODALITY)
    counts = modality_counts(scores, SPARSITIES, MODALITY)
    monkeypatch.setattr(selection, "_CHUNK", 64)
    for one, other in zip(whole, select_many(scores, SPARSITIES, within, MODALITY)):
        assert all(torch.equal(one[name], other[name]) for name in scores)
    assert modality_counts(scores, SPARSITIES, MODALITY) == counts


def test_equal_scores_fall_in_the_order_of_layer_and_index():
    scores = {"z": torch.zeros(2, 3), "a": torch.zeros(1, 4)}
    kept = select(scores, 0.7, "model")
    assert kept["z"].tolist() == [[False] * 3] * 2
    assert kept["a"].tolist() == [[False, True, True, True]]


def test_negative_zero_equals_zero():
    kept = select({"a": torch.tensor([[0.0, -0.0, 0.0, -0.0, 1.0]])}, 0.4, "model")
    assert kept["a"].tolist() == [[False, False, True, True, True]]


def test_groups_share_by_largest_remainder():
    kept = select({"a": torch.rand(1, 5), "b": torch.rand(1, 7), "c": torch.rand(1, 3)}, 0.5, "layer")
    # Quotas 2.5, 3.5, 1.5, together round(7.5) = 8: the first two of the equal remainders get one more.
    assert [int((~mask).sum()) for mask in kept.values()] == [3, 4, 1]


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_not_finite_are_refused_with_the_layer(within, bad, dtype):
    scores = {"a": torch.rand(3, 4, dtype=dtype), "b": torch.rand(3, 4, dtype=dtype)}
    scores["b"][1, 2] = bad
    with pytest.raises(ValueError, match="layer 'b': scores must be finite"):
        select(scores, 0.5, within, MODALITY)


def test_the_largest_finite_scores_are_accepted():
    assert select({"a": torch.tensor([[LARGEST, -LARGEST]])}, 0.5, "model")["a"].tolist() == [[True, False]]
    assert not select_lowest({"a": torch.full((2, 2), LARGEST)}, 4)["a"].any()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 63.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
        select({"a": torch.rand(2, 2)}, sparsity, "model")


def test_other_wrong_arguments_are_refused():
    scores = {"a": torch.rand(2, 2), "b": torch.rand(2, 2)}
    with pytest.raises(ValueError, match=r"unknown within 'column'; there are: model, modality, layer, row"):
        select(scores, 0.5, "column")
    with pytest.raises(ValueError, match="needs the modality of every layer, got none for 'b'"):
        select(scores, 0.5, "modality", {"a": "vision"})
    with pytest.raises(ValueError, match="needs the modality of every layer, got none for 'b'"):
        modality_counts(scores, [0.5], {"a": "vision"})
    with pytest.raises(ValueError, match=r"layer 'a': scores must be float32 or float64, got torch\.float16"):
        select({"a": torch.rand(2, 2).half()}, 0.5, "model")
    with pytest.raises(ValueError, match="must have one dtype"):
        select({"a": torch.rand(2, 2), "b": torch.rand(2, 2).double()}, 0.5, "model")
    with pytest.raises(ValueError, match="layer 'b': cannot prune 5 of 4 entries"):
        select_counts(scores, {"a": 0, "b": 5})
    with pytest.raises(ValueError, match=r"exactly the scored layers.*\['b', 'c'\]"):
        select_counts(scores, {"a": 0, "c": 5})
    with pytest.raises(ValueError, match="cannot prune 9 of 8 entries"):
        select_lowest(scores, 9)


def test_scores_that_require_gradients_are_taken():
    scores = {"a": torch.tensor([[1.0, 3.0, 2.0, 4.0]], requires_grad=True)}
    for within in WITHIN:
        assert select(scores, 0.5, within, MODALITY)["a"].tolist() == [[False, True, False, True]]
    assert select_pattern(scores, 1, 2)["a"].tolist() == [[False, True, False, True]]


def test_no_layers_give_no_masks():
    assert select({}, 0.5, "model") == {}
    assert select({}, 0.5, "row") == {}
    assert select({}, 0.5, "layer") == {}
    assert modality_counts({}, [0.5], {}) == [{}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_any_device_give_what_arrays_give(within, dtype, device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(50, 60, generator=generator, dtype=dtype).round(decimals=1) for name in "abc"}
    wanted = [*select_many(scores, SPARSITIES, within, MODALITY), select_pattern(scores, 3, 6)]
    counts = modality_counts(scores, SPARSITIES, MODALITY)
    monkeypatch.setattr(selection, "_array", torch.Tensor.detach)  # as on a device without NumPy
    moved = {name: values.to(device) for name, values in scores.items()}
    for one, other in zip(wanted, [*select_many(moved, SPARSITIES, within, MODALITY), select_pattern(moved, 3, 6)]):
        for name in scores:
            assert other[name].device.type == device
            assert torch.equal(one[name], other[name].cpu())
    assert modality_counts(moved, SPARSITIES, MODALITY) == counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_tensors_of_any_device_are_refused_if_not_finite(bad, device, monkeypatch):
    monkeypatch.setattr(selection, "_array", torch.Tensor.detach)
    scores = {"a": torch.ones(3, 4, device=device), "b": torch.ones(3, 4, device=device)}
    scores["b"][1, 2] = bad
    for within in WITHIN:
        with pytest.raises(ValueError, match="layer 'b': scores must be finite"):
            select(scores, 0.5, within, MODALITY)
    with pytest.raises(ValueError, match="layer 'b': scores must be finite"):
        select_pattern(scores, 2, 4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_pattern_keeps_what_sorting_every_group_keeps(data):
    of = data.draw(st.integers(2, 8))
    kept = data.draw(st.integers(1, of - 1))
    rows, n_groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    size = rows * n_groups * of
    values = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size)), dtype=dtype)
    mask = select_pattern({"a": values.reshape(rows, n_groups * of)}, kept, of)["a"]
    assert mask.shape == (rows, n_groups * of)
    for group, scores in zip(mask.view(-1, of).numpy(), values.view(-1, of).numpy()):
        [wanted] = oracle([scores], of - kept)
        np.testing.assert_array_equal(group, wanted)


def test_a_pattern_over_many_chunks_gives_what_one_gives(monkeypatch):
    scores = {"a": torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).round()}
    scores["b"] = scores["a"].T  # not contiguous
    whole = select_pattern(scores, 2, 4)
    monkeypatch.setattr(selection, "_CHUNK", 64)
    assert all(torch.equal(mask, whole[name]) for name, mask in select_pattern(scores, 2, 4).items())


def test_a_pattern_keeps_the_highest_of_every_group_of_inputs():
    scores = {"a": torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]]), "b": torch.tensor([[0.0, -1.0, 2.0, 1.0]])}
    kept = select_pattern(scores, 2, 4)
    assert kept["a"].tolist() == [[True, False, True, False, False, False, True, True]]  # of equal ones, the first goes
    assert kept["b"].tolist() == [[False, False, True, True]]
    assert select_pattern(scores, 1, 2)["a"].tolist() == [[True, False, True, False, False, True, False, True]]


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 3)])
def test_a_pattern_holds_in_every_group(kept, of):
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(500, 24 * 7, generator=generator), "b": torch.randn(3, 48, generator=generator).round()}
    for name, mask in select_pattern(scores, kept, of).items():
        groups, values = mask.view(-1, of), scores[name].view(-1, of)
        assert (groups.sum(1) == kept).all()
        assert (values.masked_fill(~groups, torch.inf).amin(1) >= values.masked_fill(groups, -torch.inf).amax(1)).all()


def test_patterns_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="layer 'b': 6 inputs cannot be cut into groups of 4"):
        select_pattern({"a": torch.ones(2, 8), "b": torch.ones(2, 6)}, 2, 4)
    with pytest.raises(ValueError, match="0 < N < M, got 4 of 4"):
        select_pattern({"a": torch.ones(2, 8)}, 4, 4)
    with pytest.raises(ValueError, match="layer 'a': scores must be finite"):
        select_pattern({"a": torch.full((2, 8), torch.nan)}, 2, 4)


def test_shapes_are_checked_while_the_tests_run():
    """An entry of the wrong rank or type, which the code itself would take, fails in the tests."""
    with pytest.raises(jaxtyping.TypeCheckError, match="magnitude_score"):
        PRUNERS["omp"].score(torch.ones(3), {})
    with pytest.raises(jaxtyping.TypeCheckError, match="solve"):
        solve(torch.ones(3), torch.ones(2, 4), 1, torch.ones(3), 0.1, [0, 3])
    with pytest.raises(jaxtyping.TypeCheckError, match="pack_bits"):
        pack_bits(torch.ones(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="select"):
        select({"a": torch.ones(2, 2, dtype=torch.int64)}, 0.5, "model")
