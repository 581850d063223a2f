import numpy as np
import pytest
import torch
from conftest import noise_image, small_model
from torch import nn

from eval import TASKS
from vlprune.config import FinetuningConfig
from vlprune.data import load_pairs, load_questions
from vlprune.execution import Interrupted
from vlprune.finetune.augment import PaperAugmentation
from vlprune.finetune.checkpoint import Checkpoint
from vlprune.finetune.loop import finetune
from vlprune.finetune.sparse import KeptSparse
from vlprune.masks import Masks, apply_masks


def random_masks(model, kept=0.3):
    generator = torch.Generator().manual_seed(0)
    return Masks({layer.name: torch.rand(layer.shape, generator=generator) < kept for layer in model.graph})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_pruned_entries_are_zero_after_every_step(task, family, dataset, monkeypatch):
    model = small_model(family)
    masks = random_masks(model)
    apply_masks(model, masks)
    model.add_task_head(task)
    data = (load_questions if task == "vqa" else load_pairs)(str(dataset), "train")
    before = {name: p.clone() for name, p in model.named_parameters()}
    checked = []

    def loss(model, examples, generator):
        for name, parameter in model.named_parameters():
            layer = model.layer_of(name)
            if name.endswith(".weight") and layer in masks:
                assert (parameter[~masks[layer]] == 0).all(), name
        checked.append(len(examples))
        return TASKS[task].loss(model, examples, generator)

    config = FinetuningConfig(
        epochs=2, batch_size=8, device_batch=5, lr=1e-2, weight_decay=0.1, decayed="all", augment="paper", select="best"
    )
    augment, scores = PaperAugmentation(model.image.size, 0), iter([1.0, 0.0])
    history = finetune(
        model, masks, model.layer_of, data, loss, config, seed=0, augment=augment, score=lambda: next(scores)
    )
    assert checked == [4] * 8
    assert len(history) == 4
    loss(model, [data[0], data[1]], torch.Generator())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 20
    assert not model.training


def test_pruned_weights_stay_zero_through_old_momentum():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    layer = model[0]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    with torch.no_grad():
        layer.weight.mul_(mask)
    sparse = KeptSparse(model, {"0": mask}, lambda name: name.removesuffix(".weight"))
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        sparse.mask_gradients()
        assert torch.equal(layer.weight.grad, mask.float())
        optimizer.step()
        assert (layer.weight[~mask] != 0).any()
        sparse.mask_weights()
        assert (layer.weight[~mask] == 0).all()
        assert (layer.weight[mask] != 0).all()


def test_gradients_of_pruned_weights_do_not_count_in_the_clipped_norm():
    mask, steps = torch.tensor([[True, False, True], [True, True, False]]), []
    for scale in (1.0, 1e6):
        model = Line()
        with torch.no_grad():
            model.layer.weight.mul_(mask)

        def loss(model, examples, generator, scale=scale):
            dead = model.layer.weight[~mask].sum()
            return squared_error(model, examples, generator) + scale * dead

        config = FinetuningConfig(steps=1, batch_size=4, lr=0.1, eps=1.0, clip=0.5, warmup=0)
        finetune(model, {"layer": mask}, lambda name: name.removesuffix(".weight"), POINTS, loss, config, 0)
        steps.append(model.layer.weight.detach().clone())
    assert torch.equal(*steps)


def test_same_seed_same_training(dataset):
    data = load_pairs(str(dataset), "train")
    config = FinetuningConfig(steps=3, batch_size=4)
    histories = []
    for seed in (0, 0, 1):
        model = small_model("xvlm")
        histories.append(finetune(model, {}, model.layer_of, data, TASKS["retrieval"].loss, config, seed))
    assert histories[0] == histories[1] != histories[2]


def test_a_loss_that_is_not_finite_stops(dataset):
    model = small_model("xvlm")
    data = load_pairs(str(dataset), "train")
    config = FinetuningConfig(steps=2, batch_size=4)
    with pytest.raises(RuntimeError, match="loss is nan at fine-tuning step 0"):
        finetune(model, {}, model.layer_of, data, lambda m, *_: m.temp * float("nan"), config, 0)


def test_no_steps_change_nothing(dataset):
    model = small_model("blip")
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = FinetuningConfig(steps=0)
    assert (
        finetune(model, {}, model.layer_of, load_pairs(str(dataset), "train"), TASKS["retrieval"].loss, config, 0) == []
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Line(nn.Module):
    """A linear layer whose squared error is a mean over the examples, in float64."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.constant_(self.layer.bias, 0.2)


def squared_error(model, examples, generator):
    x = torch.tensor([example["x"] for example in examples], dtype=torch.float64)
    y = torch.tensor([example["y"] for example in examples], dtype=torch.float64)
    return (model.layer(x) - y).square().mean()


POINTS = [{"x": [i % 3, i % 4, 1.0], "y": [i % 5, 0.5 * i]} for i in range(11)]


def fit(config, **more):
    model, masks = Line(), {"layer": torch.tensor([[True, False, True], [True, True, False]])}
    with torch.no_grad():
        model.layer.weight.mul_(masks["layer"])
    history = finetune(
        model, masks, lambda name: name.removesuffix(".weight"), POINTS, squared_error, config, 0, **more
    )
    assert (model.layer.weight[~masks["layer"]] == 0).all()
    return history, model


@pytest.mark.parametrize("device_batch", [1, 2, 3, 4, 100])
def test_accumulated_gradients_are_those_of_the_whole_batch(device_batch):
    settings = {"epochs": 3, "batch_size": 6, "lr": 0.1, "clip": 0.5}
    history, model = fit(FinetuningConfig(**settings))
    parts, other = fit(FinetuningConfig(**settings, device_batch=device_batch))
    assert parts == pytest.approx(history, abs=1e-9)
    assert torch.allclose(model.layer.weight, other.layer.weight, atol=1e-9)
    assert torch.allclose(model.layer.bias, other.layer.bias, atol=1e-9)


def test_an_epoch_sees_every_example():
    seen = []

    def loss(model, examples, generator):
        seen.append([example["y"][1] for example in examples])
        return squared_error(model, examples, generator)

    finetune(Line(), {}, str, POINTS, loss, FinetuningConfig(epochs=2, batch_size=4), 0)
    assert [len(batch) for batch in seen] == [4] * 6
    first, second = ([y for batch in seen[i : i + 3] for y in batch] for i in (0, 3))
    assert set(first) == set(second) == {0.5 * i for i in range(11)}
    assert first != second


def test_fewer_examples_than_a_batch_are_one_batch():
    history, _ = fit(FinetuningConfig(epochs=3, batch_size=100, device_batch=4))
    assert len(history) == 3


def test_no_examples_are_an_error():
    with pytest.raises(ValueError, match="there are none"):
        finetune(Line(), {}, str, [], squared_error, FinetuningConfig(epochs=1), 0)


@pytest.mark.parametrize(("scores", "best"), [([1.0, 3.0, 2.0], 1), ([2.0, 1.0, 2.0], 0), ([0.0, 1.0, 2.0], 2)])
def test_the_best_epoch_is_kept(scores, best):
    after, left = [], iter(scores)
    config = FinetuningConfig(epochs=3, batch_size=4, lr=0.1, select="best")
    model = Line()

    def score():
        assert not model.training
        after.append(model.layer.weight.detach().clone())
        return next(left)

    finetune(model, {}, str, POINTS, squared_error, config, 0, score=score)
    assert len(after) == 3
    assert torch.equal(model.layer.weight, after[best])
    assert not torch.equal(after[0], after[1])


def test_scores_that_are_no_numbers_keep_the_last():
    last = fit(FinetuningConfig(epochs=2, batch_size=4))[1]
    kept = fit(FinetuningConfig(epochs=2, batch_size=4, select="best"), score=lambda: float("nan"))[1]
    assert torch.equal(kept.layer.weight, last.layer.weight)


@pytest.mark.parametrize(("decayed", "shrunk"), [("weights", False), ("all", True)])
def test_weight_decay_of_biases_and_norms_is_a_setting(decayed, shrunk):
    model = Line()
    config = FinetuningConfig(steps=1, batch_size=4, lr=0.5, weight_decay=0.1, decayed=decayed, warmup=0)
    finetune(model, {}, str, POINTS, lambda m, *_: 0 * squared_error(m, *_), config, 0)
    assert torch.allclose(model.layer.weight, torch.tensor(0.1 * 0.95, dtype=torch.float64))
    assert torch.allclose(model.layer.bias, torch.tensor(0.2 * (0.95 if shrunk else 1), dtype=torch.float64))


def test_the_gradient_is_clipped_or_not():
    # Of plain gradients the size would be seen at once; Adam's first step has the size of eps beside the gradient.
    moved = []
    for clip in (1e-3, 0.0):
        config = FinetuningConfig(steps=1, batch_size=4, lr=0.1, weight_decay=0, eps=1.0, clip=clip, warmup=0)
        model = fit(config)[1]
        moved.append((model.layer.bias - 0.2).abs().max().item())
    assert moved[0] < 1e-4 * 1.001
    assert moved[1] > 10 * moved[0]


@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_bf16_is_near_fp32_and_leaves_weights_in_fp32(family, dataset):
    data, histories = load_pairs(str(dataset), "train"), {}
    for precision in ("fp32", "bf16", "fp32"):
        model = small_model(family)
        config = FinetuningConfig(steps=3, batch_size=4, precision=precision)
        history = finetune(model, {}, model.layer_of, data, TASKS["retrieval"].loss, config, 0)
        assert histories.setdefault(precision, history) == history
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert histories["bf16"] != histories["fp32"]
    assert histories["bf16"] == pytest.approx(histories["fp32"], rel=0.05)


def test_loader_workers_change_no_numbers():
    points = [{**point, "image": noise_image(i)} for i, point in enumerate(POINTS)]

    def loss(model, examples, generator):
        return squared_error(model, examples, generator) * sum(np.asarray(e["image"]).mean() for e in examples)

    histories = []
    for workers in (0, 2):
        config = FinetuningConfig(epochs=2, batch_size=4, device_batch=3)
        augment = PaperAugmentation(8, seed=7)
        histories.append(finetune(Line(), {}, str, points, loss, config, 0, augment=augment, workers=workers))
    assert histories[0] == histories[1]
    assert histories[0] != finetune(Line(), {}, str, points, loss, config, 0)


def dropping(model, examples, generator):
    """A loss with dropout and random choices of its own."""
    x = torch.tensor([example["x"] for example in examples], dtype=torch.float64)
    y = torch.tensor([example["y"] for example in examples], dtype=torch.float64)
    noise = torch.rand(len(x), 1, generator=generator, dtype=torch.float64)
    return (nn.functional.dropout(model.layer(x), 0.3, model.training) - y * noise).square().mean()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 3, 4, 8])
def test_an_interrupted_training_goes_on_to_bit_identical_weights(tmp_path, after, workers):
    """Steps 3 and 6 end an epoch of two passes a step, after which the best weights are chosen."""
    config = FinetuningConfig(epochs=3, batch_size=4, device_batch=2, lr=0.1, select="best")

    def fit(checkpoint=None):
        torch.manual_seed(5)
        model = Line()
        masks = {"layer": torch.tensor([[True, False, True], [True, True, False]])}
        with torch.no_grad():
            model.layer.weight.mul_(masks["layer"])
        names, score = (lambda name: name.removesuffix(".weight")), lambda: model.layer.weight.sum().item()
        more = {"score": score, "checkpoint": checkpoint, "workers": workers if checkpoint else 0}
        return finetune(model, masks, names, POINTS, dropping, config, 0, **more), model

    whole, model = fit()
    left = iter(range(after))
    path = tmp_path / "state.pt"
    with pytest.raises(Interrupted, match=r"goes on from .*state\.pt"):
        fit(Checkpoint(path, 1e9, stopping=lambda: next(left, None) is None))
    torch.rand(7)  # whatever another process draws
    history, other = fit(Checkpoint(path, 1e9))
    assert history == whole
    assert torch.equal(model.layer.weight, other.layer.weight)
    assert torch.equal(model.layer.bias, other.layer.bias)


def test_a_damaged_checkpoint_begins_anew_with_a_warning(tmp_path, caplog):
    path = tmp_path / "state.pt"
    config = FinetuningConfig(steps=3, batch_size=4)
    whole, _ = fit(config)
    assert fit(config, checkpoint=Checkpoint(path, 0.0))[0] == whole
    path.write_bytes(path.read_bytes()[:-9])
    assert fit(config, checkpoint=Checkpoint(path, 1e9))[0] == whole
    assert "state.pt is damaged" in caplog.text
