import pytest
import torch
from conftest import small_model
from torch import nn

from eval import TASKS
from vlprune.config import FinetuningConfig
from vlprune.data import load_pairs, load_questions
from vlprune.finetune import finetune, kept_sparse
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

    config = FinetuningConfig(steps=4, batch_size=5, lr=1e-2, weight_decay=0.1)
    history = finetune(model, masks, model.layer_of, data, loss, config, seed=0)
    assert checked == [5] * 4
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
    with kept_sparse(model, optimizer, {"0": mask}, lambda name: name.removesuffix(".weight")):
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).sum().backward()
            assert (layer.weight.grad[~mask] == 0).all()
            optimizer.step()
            assert (layer.weight[~mask] == 0).all()
    assert not layer.weight._backward_hooks
    assert not optimizer._optimizer_step_post_hooks


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
    assert not any(p._backward_hooks for p in model.parameters())


def test_no_steps_change_nothing(dataset):
    model = small_model("blip")
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = FinetuningConfig(steps=0)
    assert (
        finetune(model, {}, model.layer_of, load_pairs(str(dataset), "train"), TASKS["retrieval"].loss, config, 0) == []
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
