"""Two processes against one, on small models without dropout."""

import math
import re

import pytest
import torch
from conftest import noise_image, small_model
from test_openclip import write_plain
from together import in_ranks

from eval import TASKS, ranks
from eval.base import compute_together
from vlprune.config import FinetuningConfig
from vlprune.data import load_pairs, load_questions
from vlprune.execution import Interrupted
from vlprune.finetune.checkpoint import Checkpoint
from vlprune.finetune.loop import finetune
from vlprune.masks import Masks, apply_masks
from vlprune.models import load_model

FAMILIES = ("blip", "xvlm")
# A pass has 5 examples, of which two ranks have 3 and 2.
CONFIG = FinetuningConfig(steps=4, batch_size=10, device_batch=5, lr=1e-3)
LOSSES, WEIGHTS = 1e-6, 1e-5  # largest relative difference of losses, largest difference of weights


def examples_of(task, data, split):
    return (load_questions if task == "vqa" else load_pairs)(str(data), split)


def pruned(family, task):
    """A model with half of its weights, and a head for the task."""
    model = small_model(family)
    draws = torch.Generator().manual_seed(0)
    masks = Masks({layer.name: torch.rand(layer.shape, generator=draws) < 0.5 for layer in model.graph})
    apply_masks(model, masks)
    torch.manual_seed(0)
    model.add_task_head(task)
    return model, masks


def trained(data):
    """{(family, task): (losses, weights)} of fine-tuning."""
    found = {}
    for family in FAMILIES:
        for task in TASKS:
            model, masks = pruned(family, task)
            train = examples_of(task, data, "train")
            losses = finetune(model, masks, model.layer_of, train, TASKS[task].loss, CONFIG, seed=0)
            found[family, task] = losses, model.state_dict()
    return found


def test_two_ranks_train_to_the_losses_and_weights_of_one(dataset, tmp_path):
    alone = trained(dataset)
    for found in in_ranks(2, trained, dataset, directory=tmp_path):
        for place, (losses, weights) in alone.items():
            assert found[place][0] == pytest.approx(losses, rel=LOSSES)
            for name, weight in weights.items():
                assert torch.allclose(found[place][1][name], weight, rtol=0, atol=WEIGHTS), (place, name)
                assert torch.equal(found[place][1][name] == 0, weight == 0), (place, name)


def test_ranks_that_do_not_gather_negatives_have_other_losses(dataset, tmp_path):
    """That the comparison above can fail."""
    model, masks = pruned("blip", "retrieval")
    train = examples_of("retrieval", dataset, "train")
    whole, parts = (
        finetune(model, masks, model.layer_of, train, TASKS["retrieval"].loss, config, seed=0)
        for config in (CONFIG, FinetuningConfig(steps=4, batch_size=10, device_batch=3, lr=1e-3))
    )
    assert parts != pytest.approx(whole, rel=100 * LOSSES)


def contrastive(_directory):
    """The losses of CLIP and CoCa of this rank's pairs, and their gradients, averaged as training averages them."""
    rows = slice(3) if ranks.rank() == 0 else slice(3, 5)
    rows = slice(5) if ranks.world() == 1 else rows
    images = [noise_image(i) for i in range(5)][rows]
    texts = ["a cat", "two dogs on a long beach", "a cat", "a ring", "a red ring"][rows]
    found = {}
    for name in ("clip", "coca"):
        model = load_model(str(_directory / name))
        loss = model.retrieval_loss(images, texts, [0, 1, 0, 3, 4][rows], torch.Generator())
        if name == "coca":
            loss = loss + model.captioning_loss(images, texts)
        (loss * len(images) * ranks.world() / 5).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():
            if ranks.world() > 1:
                torch.distributed.all_reduce(gradient)
                gradient /= ranks.world()
        value = sum(ranks.listed([loss.item() * len(images) / 5]))
        found[name] = value, gradients
    return found


def test_two_ranks_have_the_contrastive_loss_and_gradients_of_one(tmp_path):
    for name in ("clip", "coca"):
        write_plain(tmp_path / name, name)
    alone = contrastive(tmp_path)
    for found in in_ranks(2, contrastive, tmp_path, directory=tmp_path):
        for name, (loss, gradients) in alone.items():
            assert found[name][0] == pytest.approx(loss, rel=LOSSES)
            assert found[name][1].keys() == gradients.keys()
            for parameter, gradient in gradients.items():
                assert torch.allclose(found[name][1][parameter], gradient, rtol=1e-4, atol=1e-6), parameter


def interrupted(data, path):
    """(losses, weights, what was said) of a training that one rank is asked to stop after two steps, and goes on."""
    train, said = examples_of("retrieval", data, "train"), []

    def fit(stopping=lambda: False):
        model, masks = pruned("xvlm", "retrieval")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        checkpoint = Checkpoint(path, 1e9, stopping)
        torch.manual_seed(0)
        losses = finetune(
            model,
            masks,
            model.layer_of,
            train,
            TASKS["retrieval"].loss,
            CONFIG,
            seed=0,
            score=lambda: float(ranks.rank()),
            checkpoint=checkpoint,
        )
        return losses, model.state_dict()

    whole = fit()
    left = iter(range(1 if ranks.rank() else 100))
    try:
        fit(lambda: next(left, None) is None)
    except Interrupted as stop:
        said.append(str(stop))
    return whole, fit(), said


def test_ranks_stop_together_and_go_on_to_bit_identical_weights(dataset, tmp_path):
    found = in_ranks(2, interrupted, dataset, tmp_path / "state.pt", directory=tmp_path)
    for whole, resumed, said in found:
        assert len(said) == 1
        assert resumed[0] == whole[0] == found[0][0][0]
        assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())
        assert all(torch.equal(value, found[0][0][1][name]) for name, value in whole[1].items())


def not_a_number(data):
    model, masks = pruned("xvlm", "retrieval")
    train = examples_of("retrieval", data, "train")

    def loss(model, examples, generator):
        return model.temp * (math.nan if ranks.rank() else 1.0)

    try:
        finetune(model, masks, model.layer_of, train, loss, CONFIG, seed=0)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_loss_that_is_not_finite_in_one_rank_stops_all(dataset, tmp_path):
    for message in in_ranks(2, not_a_number, dataset, directory=tmp_path):
        assert re.match("the loss is nan at fine-tuning step 0", message)


def exchanged():
    own = ranks.rank() + 1  # 1 or 2 examples
    rows = torch.arange(float(own)).requires_grad_()
    total = (ranks.gathered(rows) * torch.tensor([1.0, 2.0, 3.0])).sum()
    total.backward()
    return {
        "rank": (ranks.rank(), ranks.world()),
        "told": ranks.told(own),
        "listed": ranks.listed([own] * own),
        "share": ranks.share(own),
        "gathered": ranks.gathered(rows).tolist(),
        "gradient": rows.grad.tolist(),
        "mask": ranks.gathered(torch.tensor([[True, False]] * own)).tolist(),
        "mean": ranks.mean_of_all(torch.tensor(3.0 * own), count=own, n=own).item(),
        "turns": list(ranks.in_turns([lambda i=i: (i, ranks.rank()) for i in range(5)])),
    }


def test_what_ranks_exchange(tmp_path):
    first, second = in_ranks(2, exchanged, directory=tmp_path)
    both = {"told": 1, "listed": [1, 2, 2], "gathered": [0.0, 0.0, 1.0], "mask": [[True, False]] * 3}
    both["turns"] = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    # The loss of all rows is computed twice, and so is its gradient.
    assert first == {**both, "rank": (0, 2), "share": (slice(0, 1), 3), "gradient": [2.0], "mean": 3.0}
    assert second == {**both, "rank": (1, 2), "share": (slice(1, 3), 3), "gradient": [4.0, 6.0], "mean": 6.0}


def test_one_rank_gets_what_it_gives():
    rows = torch.ones(2, 3)
    assert ranks.gathered(rows) is rows
    assert ranks.listed("ab") == ["a", "b"]
    assert ranks.share(3) == (slice(0, 3), 3)
    assert list(ranks.in_turns([lambda: 1, lambda: 2])) == [1, 2]
    assert (ranks.told(5), ranks.rank(), ranks.world()) == (5, 0, 1)


def predicted(data):
    """{(family, task): predictions} in parts of a few."""
    import eval.captioning
    import eval.retrieval
    import eval.vqa

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((eval.retrieval, "BATCH"), (eval.captioning, "BATCH"), (eval.vqa, "IMAGES")):
            patch.setattr(module, name, 2)
        for family in FAMILIES:
            for task in TASKS:
                model, _ = pruned(family, task)
                chosen, test = TASKS[task], examples_of(task, data, "test")
                ready = chosen.prepare(test) if chosen.prepare else None
                options = chosen.options(**({} if task != "captioning" else {"max_length": 12}))
                found[family, task] = chosen.predict(model, test, options, ready, compute_together)
    return found


def test_two_ranks_predict_what_one_does(dataset, tmp_path):
    alone = predicted(dataset)
    for found in in_ranks(2, predicted, dataset, directory=tmp_path):
        assert found == alone
