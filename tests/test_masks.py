"""Masks applied, measured, compared and stored."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from vlprune.graph import BipartiteLayer, LayerGraph
from vlprune.masks import (
    Masks,
    apply_masks,
    mask_hash,
    measure,
    overlap,
    pack_bits,
    sparsity,
    unpack_bits,
)
from vlprune.store.masks import load_masks, load_provenance, save_masks

GRAPH = LayerGraph(
    (
        BipartiteLayer("eyes.0", (3, 5), "vision", "patches"),
        BipartiteLayer("eyes.1", (4, 3), "vision", "patches"),
        BipartiteLayer("words", (2, 9), "text", "tokens"),
    )
)


@dataclass
class ToyModel:
    graph: LayerGraph = GRAPH
    parameters: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)
        for layer in self.graph:
            self.parameters[layer.name] = nn.Parameter(torch.randn(layer.shape, generator=generator))

    def weight(self, name):
        return self.parameters[name]


def random_masks(seed=0, *, moved=False):
    generator = torch.Generator().manual_seed(seed)
    masks = {layer.name: torch.rand(layer.shape, generator=generator) > 0.6 for layer in GRAPH}
    weights = {name: torch.randn(mask.shape, generator=generator) * mask for name, mask in masks.items()}
    return Masks(masks, weights if moved else None)


def test_apply_zeroes_the_pruned_and_leaves_the_rest():
    model, masks = ToyModel(), random_masks()
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    assert apply_masks(model, masks) is None
    for name, mask in masks.items():
        assert torch.equal(model.weight(name)[mask], before[name][mask])
        assert (model.weight(name)[~mask] == 0).all()
        assert model.weight(name).requires_grad
    assert measure(model) == pytest.approx(sparsity(masks))


def test_apply_writes_moved_weights():
    model, masks = ToyModel(), random_masks(moved=True)
    apply_masks(model, masks)
    for name in masks:
        assert torch.equal(model.weight(name), masks.weights[name])


def test_apply_zeroes_even_weights_that_are_not_finite():
    model, masks = ToyModel(), random_masks()
    masks["words"][0, 0] = False
    model.weight("words").data[0, 0] = float("nan")
    apply_masks(model, masks)
    assert model.weight("words")[0, 0] == 0


def test_masks_of_another_model_are_refused_and_nothing_changes():
    model = ToyModel()
    before = model.weight("eyes.0").detach().clone()
    unknown = Masks({**random_masks(), "nose": torch.ones(1, 1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"no prunable layers \['nose'\]; there are: eyes.0, eyes.1, words"):
        apply_masks(model, unknown)
    missing = random_masks()
    del missing["words"]
    with pytest.raises(ValueError, match=r"no mask for the layers \['words'\]"):
        apply_masks(model, missing)
    misshaped = random_masks()
    misshaped["words"] = misshaped["words"].T
    with pytest.raises(ValueError, match=r"layer 'words': mask must have shape \(2, 9\), got \(9, 2\)"):
        apply_masks(model, misshaped)
    incomplete = random_masks(moved=True)
    del incomplete.weights["words"]
    with pytest.raises(ValueError, match=r"no weight for the layers \['words'\]"):
        apply_masks(model, incomplete)
    assert torch.equal(model.weight("eyes.0"), before)


def test_moved_weights_that_are_missing_change_nothing():
    model = nn.ModuleDict({"eyes": nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])})
    before = model["eyes"][0].weight.clone()
    bits = {f"eyes.{i}": torch.zeros(model["eyes"][i].weight.shape, dtype=torch.bool) for i in range(2)}
    for wrong in ({}, {"eyes.1": torch.zeros(3, 3)}):
        masks = Masks(bits, {"eyes.0": torch.ones(3, 2), **wrong})
        with pytest.raises(ValueError, match=r"layer 'eyes.1': no moved weight of its mask's shape \(2, 3\)"):
            masks.apply(model)
        assert torch.equal(model["eyes"][0].weight, before)


def test_sparsity_is_the_pruned_fraction():
    assert sparsity({"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, False]])}) == 0.75


def test_overlap_is_intersection_over_union():
    a = Masks({layer.name: torch.zeros(layer.shape, dtype=torch.bool) for layer in GRAPH})
    b = Masks({name: mask.clone() for name, mask in a.items()})
    a["eyes.0"][0, :3] = True
    b["eyes.0"][0, 1:5] = True  # 2 of 5
    a["eyes.1"][0, 0] = True  # 0 of 1
    assert overlap(a, b) == {"eyes.0": 0.4, "eyes.1": 0.0, "words": 1.0}
    grouped = overlap(a, b, GRAPH.modality)
    assert grouped == {"eyes.0": 0.4, "eyes.1": 0.0, "words": 1.0, "vision": 2 / 6, "text": 1.0, "all": 2 / 6}
    assert overlap(a, b, {})["all"] == 2 / 6
    with pytest.raises(ValueError, match=r"different layers.*\['words'\]"):
        overlap(a, Masks({name: mask for name, mask in b.items() if name != "words"}))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.randoms(use_true_random=False))
def test_bits_survive_packing(n_out, n_in, random):
    mask = torch.tensor([[random.random() < 0.5 for _ in range(n_in)] for _ in range(n_out)])
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-n_out * n_in // 8)
    assert torch.equal(unpack_bits(packed, (n_out, n_in)), mask)


@pytest.mark.parametrize("moved", [False, True])
def test_a_bundle_is_read_back_whole(tmp_path, moved):
    path = tmp_path / "new" / "masks.safetensors"
    masks = random_masks(moved=moved)
    save_masks(path, masks, {"method": "omp", "seed": "3"})
    loaded = load_masks(path)
    assert list(loaded) == list(masks)
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert (loaded.weights is None) == (not moved)
    if moved:
        assert all(torch.equal(loaded.weights[name], masks.weights[name]) for name in masks)
    assert load_provenance(path) == {"method": "omp", "seed": "3"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_bundle_holds_one_bit_an_edge(tmp_path):
    save_masks(tmp_path / "m", Masks({"a": torch.ones(400, 800, dtype=torch.bool)}), {})
    assert (tmp_path / "m").stat().st_size < 400 * 800 / 8 + 1000


def test_the_hash_sees_bits_shapes_names_aliases_and_weights_and_no_order():
    masks = random_masks(moved=True)
    same = Masks({name: masks[name] for name in reversed(masks)}, masks.weights)
    assert mask_hash(same) == mask_hash(masks)
    others = [Masks({**masks}), random_masks(1, moved=True)]
    others += [Masks({name + "x": mask for name, mask in masks.items()})]
    others += [Masks({name: mask.reshape(1, -1) for name, mask in masks.items()})]
    others += [Masks({**masks}, {name: weight * 2 for name, weight in masks.weights.items()})]
    others += [Masks(masks, masks.weights, {name: [name + "x"] for name in masks})]
    assert len({mask_hash(other) for other in [masks, *others]}) == len(others) + 1


def test_damage_is_one_clear_error(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks(path, random_masks(moved=True), {})
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[-3] ^= 1
    for content in (intact[:-5], intact[:20], b"", bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"masks.safetensors is not an intact mask bundle"):
            load_masks(path)
    save_file({"x": torch.zeros(1)}, path)
    for load in (load_masks, load_provenance):
        with pytest.raises(ValueError, match="its format is None, not 'vlprune-masks-1'"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_bundle(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    save_masks(path, random_masks(), {"old": "yes"})

    def fail(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("vlprune.store.masks.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_masks(path, random_masks(1), {})
    assert load_provenance(path) == {"old": "yes"}
    assert len(list(tmp_path.iterdir())) == 1
