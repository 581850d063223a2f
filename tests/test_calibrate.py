import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_model

from vlprune.batch import Batch
from vlprune.calibrate import inputs as inputs_module
from vlprune.calibrate.collect import collect, load_statistics, save_statistics
from vlprune.calibrate.inputs import Inputs
from vlprune.stages.masks import compute_masks

# Prints a digest of the masks of methods after a calibration with so many threads.
MASKS = """
import hashlib, sys, torch
from conftest import CAPTIONS, noise_image, small_model
from vlprune.batch import Batch
from vlprune.calibrate.collect import collect
from vlprune.stages.masks import compute_masks
torch.set_num_threads(int(sys.argv[1]))
model = small_model("blip")
batches = [Batch([noise_image(5 * i + j) for j in range(5)], CAPTIONS) for i in range(2)]
stats = collect(model, batches, {"input_sq", "grad"})
for method in ("multiflow", "omp", "snip", "lamp"):
    masks = compute_masks(model, method, 0.75, stats=stats)
    print(method, hashlib.sha256(b"".join(masks[layer.name].numpy().tobytes() for layer in model.graph)).hexdigest())
"""


def test_statistics_have_the_shapes_of_their_layers(model, batch):
    stats = collect(model, [batch, batch], {"input_sq", "grad", "grad_rows", "row_size"})
    assert list(stats) == [layer.name for layer in model.graph]
    for layer in model.graph:
        out, inputs = layer.shape
        assert stats[layer.name]["input_sq"].shape == (inputs,)
        assert stats[layer.name]["grad"].shape == (out, inputs)
        assert stats[layer.name]["grad_rows"].shape == (2, out * inputs)
        assert stats[layer.name]["row_size"] == (8 if model.uses_regions else 5)  # five pairs, three regions
        mean = stats[layer.name]["grad_rows"].mean(0).view(out, inputs)
        torch.testing.assert_close(stats[layer.name]["grad"], mean)


def test_input_squares_by_hand(batch):
    """The first text layer reads the embeddings: the sum over valid tokens, over the number of sequences."""
    model = small_model("xvlm")
    plain = Batch(batch.images, batch.texts)
    stats = collect(model, [plain], {"input_sq"})
    tokens = model.tokenize(batch.texts)
    embedded = model.text_encoder.embeddings(tokens.ids)[tokens.attention_mask]
    expected = embedded.square().sum(0) / len(batch.texts)
    torch.testing.assert_close(stats["text_encoder.layer.0.attention.self.query"]["input_sq"], expected.detach())


def test_padding_does_not_reach_statistics(model, batch):
    """A longer text in another batch row pads the others, and must not change what they contribute."""
    short = Batch(batch.images[:2], ["a dog", "a cat"])
    mixed = Batch(batch.images[:3], ["a dog", "a cat", "a man riding a horse on the beach near a dog"])
    alone = Batch(batch.images[2:3], mixed.texts[2:])
    together = collect(model, [mixed], {"input_sq"})
    apart = collect(model, [short, alone], {"input_sq"})
    for name in together:
        torch.testing.assert_close(together[name]["input_sq"], apart[name]["input_sq"], rtol=2e-5, atol=1e-5)


def test_losses_do_not_change_the_activation_statistics(model, batch):
    forward = collect(model, [batch], {"input_sq"})
    both = collect(model, [batch], {"input_sq", "grad"})
    for name in forward:
        torch.testing.assert_close(forward[name]["input_sq"], both[name]["input_sq"])


def test_gradient_is_that_of_the_scored_losses(model, batch):
    stats = collect(model, [batch], {"grad"}, seed=4)
    losses = model.pretraining_losses(batch, torch.Generator().manual_seed(4))
    sum(losses[name] for name in model.scored_losses).backward()
    for layer in model.graph:
        torch.testing.assert_close(stats[layer.name]["grad"], model.weight(layer.name).grad)


def test_the_model_is_left_as_it_was(model, batch):
    before = {name: p.clone() for name, p in model.named_parameters()}
    collect(model, [batch], {"input_sq", "grad"})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not _hooks(model)


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(AttributeError):
        collect(model, [None], {"input_sq"})
    assert not _hooks(model)
    assert model.attention_masks == {}


def _hooks(model):
    return [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]


def test_errors_say_what_is_wrong(model, batch):
    with pytest.raises(
        ValueError,
        match=r"unknown statistic 'hessian'. There are: input_sq, input_outer, grad, grad_sq, grad_rows, row",
    ):
        collect(model, [batch], {"hessian"})
    with pytest.raises(ValueError, match="at least one batch"):
        collect(model, [], {"input_sq"})
    layer = model.graph.layers[0]
    with torch.no_grad():
        model.weight(layer.name)[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        collect(model, [batch], {"grad"})
    with pytest.raises(RuntimeError, match="not finite"):
        collect(model, [batch], {"input_sq"})


def test_a_layer_without_input_is_an_error(model, batch, monkeypatch):
    monkeypatch.setattr(model, "recording", lambda **_: nullcontext())
    with pytest.raises(RuntimeError, match="no input reached layer vision_model"):
        collect(model, [batch], {"input_sq"})


def test_statistics_round_trip(model, batch, tmp_path):
    stats = collect(model, [batch], {"input_sq", "grad"})
    save_statistics(stats, tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors", torch.device("cpu"))
    assert set(again) == set(stats)
    for name, kinds in stats.items():
        for kind, tensor in kinds.items():
            assert torch.equal(again[name][kind], tensor)


def test_regions_that_are_all_alike_are_left_out(batch):
    """Matching needs a negative for each region."""
    model = small_model("xvlm")
    plain = collect(model, [Batch(batch.images, batch.texts)], {"input_sq", "grad"})
    lonely = collect(model, [Batch(batch.images, batch.texts, batch.regions[:1])], {"input_sq", "grad"})
    for name, kinds in plain.items():
        assert all(torch.equal(lonely[name][kind], tensor) for kind, tensor in kinds.items())


def test_squared_gradients_are_means_over_batches(model, batch):
    other = Batch(batch.images, batch.texts[::-1], batch.regions)
    stats = collect(model, [batch, other], {"grad", "grad_sq", "grad_rows"})
    for kinds in stats.values():
        rows = kinds["grad_rows"].view(2, *kinds["grad"].shape)
        torch.testing.assert_close(kinds["grad"], rows.mean(0))
        torch.testing.assert_close(kinds["grad_sq"], rows.square().mean(0))


def test_input_products_by_hand(batch):
    model = small_model("xvlm")
    stats = collect(model, [Batch(batch.images, batch.texts)], {"input_outer"})
    tokens = model.tokenize(batch.texts)
    embedded = model.text_encoder.embeddings(tokens.ids)[tokens.attention_mask].detach()
    expected = embedded.T @ embedded / len(batch.texts)
    torch.testing.assert_close(stats["text_encoder.layer.0.attention.self.query"]["input_outer"], expected)


def test_input_squares_are_the_diagonal_of_the_products(model, batch):
    for kinds in collect(model, [batch, batch], {"input_sq", "input_outer"}).values():
        torch.testing.assert_close(kinds["input_outer"].diagonal(), kinds["input_sq"], rtol=1e-4, atol=1e-5)


def test_finite_differences_follow_the_gradient_along_the_noise(batch):
    """Over many batches, the mean of |gradient . z| is sqrt(2 / pi) times the norm of the gradient."""
    model = small_model("blip")
    name = model.graph.layers[0].name
    before = model.weight(name).clone()
    [kinds] = collect(model, [batch] * 30, {"zo_grad", "grad_sq"}, layers=[name]).values()
    expected = (2 / torch.pi) ** 0.5 * kinds["grad_sq"].sum().sqrt()
    torch.testing.assert_close(kinds["zo_grad"], expected, rtol=0.4, atol=0)
    assert torch.equal(model.weight(name), before)


def test_a_layer_measures_the_same_alone(model, batch):
    needs = {"input_sq", "grad", "zo_grad"}
    name = model.graph.layers[2].name
    together, alone = (collect(model, [batch], needs, layers=layers) for layers in (None, [name]))
    assert list(alone) == [name]
    for kind in needs:
        torch.testing.assert_close(alone[name][kind], together[name][kind])


def test_weights_come_back_after_an_error(model, batch, monkeypatch):
    before = {layer.name: model.weight(layer.name).clone() for layer in model.graph}

    def fail(*_):
        raise RuntimeError("no losses")

    monkeypatch.setattr(model, "pretraining_losses", fail)
    with pytest.raises(RuntimeError, match="no losses"):
        collect(model, [batch], {"zo_grad"})
    assert all(torch.equal(model.weight(name), weight) for name, weight in before.items())


def test_alignment_weighs_the_contrastive_loss(model, batch):
    plain, heavy, none = (collect(model, [batch], {"grad"}, alignment=weight) for weight in (1.0, 3.0, 0.0))
    for name in plain:
        contrastive = plain[name]["grad"] - none[name]["grad"]
        torch.testing.assert_close(heavy[name]["grad"], none[name]["grad"] + 3 * contrastive, rtol=1e-3, atol=1e-5)
    model.scored_losses = tuple(loss for loss in model.scored_losses if loss != "itc")
    with pytest.raises(ValueError, match="alignment weighs the loss 'itc', which the model does not have; it has: itm"):
        collect(model, [batch], {"grad"}, alignment=2.0)


def test_unknown_layers_are_refused(model, batch):
    with pytest.raises(ValueError, match=r"unknown layer 'head'. There are: vision_model"):
        collect(model, [batch], {"input_sq"}, layers=["head"])


def test_masks_do_not_depend_on_the_number_of_threads():
    def masks(n_threads):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment["OMP_WAIT_POLICY"] = "passive"  # threads that spin starve each other where cores are few
        command = [sys.executable, "-c", MASKS, str(n_threads)]
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    one = masks(1)
    assert len(one) == 4
    assert masks(2) == one


def test_masks_do_not_depend_on_how_batches_are_cut(model, batch):
    images, texts = [*batch.images, *batch.images[:3]], [*batch.texts, "a fish", "a bird on a roof", "two blue cats"]
    cut = [Batch(images[:4], texts[:4]), Batch(images[4:], texts[4:])]
    masks = [
        compute_masks(model, "multiflow", 0.75, stats=collect(model, batches, {"input_sq"}))
        for batches in (cut, [Batch(images, texts)])
    ]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_sums_of_inputs_do_not_depend_on_how_many_are_held(model, batch, monkeypatch):
    held = collect(model, [batch, batch], {"input_sq"})
    monkeypatch.setattr(inputs_module, "HELD", 0)
    alone = collect(model, [batch, batch], {"input_sq"})
    for name in held:
        torch.testing.assert_close(held[name]["input_sq"], alone[name]["input_sq"], rtol=1e-6, atol=0)


def test_sums_of_inputs_do_not_grow_with_the_number_of_batches(model, batch):
    inputs = Inputs(model, list(model.graph), outer=True)
    inputs.active = True
    sizes = []
    with inputs.hooked(), torch.no_grad():
        for _ in range(4):
            model.calibration_forward(batch)
            inputs.add()
            sizes.append(sum(value.nbytes for sums in inputs.sums.values() for value in sums.values()))
            assert not inputs.reads
    assert sizes[0] > 0
    assert set(sizes) == {sizes[0]}


@pytest.mark.parametrize("kinds", [{"input_sq"}, {"input_outer"}, {"grad"}, {"grad_sq"}, {"input_sq", "grad"}])
def test_a_statistic_does_not_depend_on_what_else_is_measured(model, batch, kinds):
    """Bit for bit: a stored statistic stands for both."""
    together = collect(model, [batch, batch], {"input_sq", "input_outer", "grad", "grad_sq", "zo_grad"})
    for layer, own in collect(model, [batch, batch], kinds).items():
        for kind in kinds:
            assert torch.equal(own[kind], together[layer][kind]), (layer, kind)


def test_regions_that_the_losses_drop_are_no_samples(batch):
    model = small_model("xvlm")
    alike = replace(batch, regions=[(i, box, "a dog") for i, box, _ in batch.regions])
    for own, n_samples in ((batch, 8), (alike, 5)):
        stats = collect(model, [own], {"grad_rows", "row_size"})
        assert {float(kinds["row_size"]) for kinds in stats.values()} == {n_samples}
