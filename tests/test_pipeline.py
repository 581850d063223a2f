import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_model

import eval
import vlprune as vp
from eval import get_task
from vlprune import masking, pipeline
from vlprune.config import CalibrationConfig, FinetuningConfig, PruningConfig, RunConfig, TaskConfig
from vlprune.models.checkpoints import build, save_directory


@pytest.fixture
def config(dataset, tmp_path):
    """A run of seconds on a small model in a directory and a small data set."""
    model = small_model("xvlm")
    save_directory(model, tmp_path / "model")
    return RunConfig(
        model=str(tmp_path / "model"),
        calibration=CalibrationConfig(str(dataset), n_batches=2, batch_size=4, steps=2, step_batches=1),
        pruning=PruningConfig("omp", 0.75),
        finetuning=FinetuningConfig(steps=2, batch_size=4),
        task=TaskConfig("retrieval", str(dataset), k_test=10),
    )


@pytest.mark.parametrize("method", vp.PRUNERS)
def test_every_method_prunes_exactly_through_the_whole_run(config, method, tmp_path):
    outcome = pipeline.run(replace(config, pruning=PruningConfig(method, 0.75)), tmp_path / "cache")
    n_edges = small_model("xvlm").graph.n_edges
    assert outcome.sparsity == pytest.approx(round(0.75 * n_edges) / n_edges, abs=1e-12)
    assert outcome.peak_memory > 2**20
    assert set(outcome.seconds) == {"load", "prune", "finetune", "evaluate"}


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_every_task_scores_a_dense_run(config, task, tmp_path):
    dense = replace(config, pruning=PruningConfig(), task=replace(config.task, name=task, max_length=8))
    outcome = pipeline.run(dense, tmp_path / "cache")
    assert outcome.sparsity == 0
    assert all(0 <= value <= 1000 for value in outcome.metrics.values())
    assert outcome.floors
    assert outcome.predictions


def test_one_calibration_pass_serves_all_methods(config, tmp_path, monkeypatch):
    passes = []
    collect = masking.collect
    monkeypatch.setattr(masking, "collect", lambda *a, **k: passes.append(a[2]) or collect(*a, **k))
    needs = {"input_sq", "grad"}
    for method in ("omp", "multiflow", "snip", "multiflow"):
        for sparsity in (0.63, 0.9):
            pipeline.run(replace(config, pruning=PruningConfig(method, sparsity)), tmp_path / "cache", needs)
    assert passes == [needs]


def test_the_same_run_gives_the_same_numbers(config, tmp_path):
    snip = replace(config, pruning=PruningConfig("snip", 0.5))
    a, b = (pipeline.run(snip, tmp_path / name) for name in ("a", "b"))
    assert a.metrics == b.metrics
    assert a.predictions == b.predictions
    assert a.layer_sparsity == b.layer_sparsity


def test_the_public_lines_of_the_readme(dataset, caplog):
    model = small_model("blip")
    batches = vp.calibration_batches(str(dataset), model, n_batches=2, batch_size=4, seed=0)
    stats = vp.collect(model, batches, needs=vp.PRUNERS["multiflow"].needs)
    before = model.weight(model.graph.layers[0].name).clone()
    masks = vp.compute_masks(model, "multiflow", sparsity=0.75, stats=stats)
    assert torch.equal(model.weight(model.graph.layers[0].name), before)
    vp.apply_masks(model, masks)
    pruned = sum(int((model.weight(layer.name) == 0).sum()) for layer in model.graph)
    assert pruned == round(0.75 * model.graph.n_edges)
    assert "tr_r1" in vp.evaluate(model, task="retrieval", data=str(dataset))
    (dataset / "answer_list.json").write_text(json.dumps(["maybe"]))
    vp.evaluate(model, task="vqa", data=str(dataset))
    assert "the answer list of 1 answers has only 0 % of the 120 training answers" in caplog.text


def test_an_iterative_method_without_batches_says_so():
    with pytest.raises(ValueError, match="it needs `batches`"):
        vp.compute_masks(small_model("blip"), "itersnip", 0.5, stats={})


def test_a_failing_calibration_restores_the_weights(batch):
    model = small_model("xvlm")
    before = {layer.name: model.weight(layer.name).clone() for layer in model.graph}

    def batches(step):
        if step == 1:
            raise KeyboardInterrupt
        return [batch]

    with pytest.raises(KeyboardInterrupt):
        vp.compute_masks(model, "itersnip", 0.5, batches=batches, steps=2)
    assert all(torch.equal(model.weight(name), weight) for name, weight in before.items())


@pytest.fixture
def finetuned(monkeypatch):
    """(model, examples, losses) of every fine-tuning."""
    found, own = [], pipeline.finetune

    def finetune(model, masks, layer_of, examples, *others, **more):
        found.append((model, examples, own(model, masks, layer_of, examples, *others, **more)))
        return found[-1][2]

    monkeypatch.setattr(pipeline, "finetune", finetune)
    return found


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_masks_from_the_cache_give_the_same_training(task, config, finetuned, tmp_path):
    """With dropout, random captions and augmentation."""
    model = small_model("xvlm")
    text = {**model.config["text"], "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    save_directory(build({**model.config, "text": text}, model.tokenizer), Path(config.model))
    own = replace(
        config,
        pruning=PruningConfig("snip", 0.5),
        finetuning=FinetuningConfig(epochs=1, batch_size=10, device_batch=6, augment="paper"),
        task=replace(config.task, name=task, image_size=48),
    )
    made, cached = (pipeline.run(own, tmp_path / "cache") for _ in range(2))
    other = pipeline.run(replace(own, seed=1), tmp_path / "cache")
    losses = [losses for _, _, losses in finetuned]
    assert losses[0] == losses[1] != losses[2]
    assert (made.metrics, made.predictions) == (cached.metrics, cached.predictions)
    assert made.layer_sparsity == cached.layer_sparsity != other.layer_sparsity
    assert made.sparsity == pytest.approx(0.5, abs=1e-5)
    assert [model.image.size for model, _, _ in finetuned] == [48] * 3


def test_epochs_count_captions_and_steps_count_images(config, finetuned, tmp_path):
    pipeline.run(config, tmp_path / "cache")
    pipeline.run(replace(config, finetuning=FinetuningConfig(epochs=1, batch_size=30)), tmp_path / "cache")
    questions = replace(config, task=replace(config.task, name="vqa"))
    pipeline.run(replace(questions, finetuning=FinetuningConfig(epochs=1, batch_size=30)), tmp_path / "cache")
    assert [len(examples) for _, examples, _ in finetuned] == [12, 12 * 5, 12]
    assert [len(losses) for _, _, losses in finetuned] == [2, 2, 1]


def test_the_best_epoch_on_val_is_tested_once(config, tmp_path, monkeypatch):
    task, predicted, states, scores = get_task("retrieval"), [], [], iter([1.0, 3.0, 2.0])

    def predict(model, examples, *others):
        predicted.append(len(examples))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return task.predict(model, examples, *others)

    def score(predictions, examples):
        return {**task.score(predictions, examples), **({"r_mean": next(scores)} if len(examples) == 4 else {})}

    monkeypatch.setitem(eval.TASKS, "retrieval", replace(task, predict=predict, score=score))
    best = FinetuningConfig(epochs=3, batch_size=30, select="best")
    outcome = pipeline.run(replace(config, finetuning=best), tmp_path / "cache")
    assert predicted == [4, 4, 4, 6]
    assert all(torch.equal(value, states[1][name]) for name, value in states[3].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[3].items())
    assert set(outcome.metrics) == set(task.metrics)


def test_a_test_split_without_answers_is_predicted_and_not_scored(config, dataset, tmp_path):
    (dataset / "test_annotations.json").unlink()
    outcome = pipeline.run(replace(config, task=replace(config.task, name="vqa")), tmp_path / "cache")
    assert (outcome.metrics, outcome.floors) == ({}, {})
    assert len(outcome.predictions) == 6
    assert {prediction["answer"] for prediction in outcome.predictions} <= {"yes", "no"}


def test_the_answer_list_of_the_data_is_ranked(config, dataset, tmp_path):
    (dataset / "answer_list.json").write_text(json.dumps(["a dog", "no dog"]))
    outcome = pipeline.run(replace(config, task=replace(config.task, name="vqa")), tmp_path / "cache")
    assert {prediction["answer"] for prediction in outcome.predictions} <= {"a dog", "no dog"}


def test_several_splits_are_trained_on(config, finetuned, tmp_path):
    several = replace(config, task=replace(config.task, name="vqa", train="train+val", test="val"))
    outcome = pipeline.run(several, tmp_path / "cache")
    assert len(finetuned[0][1]) == 12 + 4
    assert len(outcome.predictions) == 4


def test_broken_images_are_left_out_where_that_is_asked_for(config, dataset, tmp_path):
    for name in ("0003.png", "0017.png"):  # of train and test
        (dataset / "images" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read image .*png"):
        pipeline.run(replace(config, pruning=PruningConfig("multiflow", 0.5)), tmp_path / "cache")
    outcome = pipeline.run(
        replace(config, pruning=PruningConfig("multiflow", 0.5)), tmp_path / "cache", skip_broken=True
    )
    assert len(outcome.predictions) == 5 + 5 * 5
