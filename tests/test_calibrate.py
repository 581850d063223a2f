import pytest
import torch
from conftest import small_model

from vlprune.batch import Batch
from vlprune.calibrate import collect, load_statistics, save_statistics


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
    embedded = model.text_encoder.embeddings(tokens.ids)[tokens.valid]
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
    assert model.valid == {}


def _hooks(model):
    return [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]


def test_errors_say_what_is_wrong(model, batch):
    with pytest.raises(
        ValueError, match=r"unknown statistics: hessian; there are: input_sq, grad, grad_rows, row_size"
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
    monkeypatch.setattr(model, "_recorded_images", lambda _: model.encode_images(model.pixels(batch.images)))
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
