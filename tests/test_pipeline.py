from dataclasses import replace

import pytest
import torch
from conftest import small_model

import vlprune as vp
from vlprune import pipeline
from vlprune.config import CalibrationConfig, FinetuningConfig, PruningConfig, RunConfig, TaskConfig
from vlprune.models.checkpoints import save_directory


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
    collect = pipeline.collect
    monkeypatch.setattr(pipeline, "collect", lambda *a, **k: passes.append(a[2]) or collect(*a, **k))
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


def test_the_public_lines_of_the_readme(dataset):
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
