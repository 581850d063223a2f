import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_model

import eval
import vlprune as vp
from eval import get_task
from vlprune.config import (
    CalibrationConfig,
    FinetuningConfig,
    ModelConfig,
    Options,
    PruningConfig,
    RunConfig,
    TaskConfig,
)
from vlprune.execution import Execution, Interrupted
from vlprune.models import build_model, save_model
from vlprune.pipeline import chain, run
from vlprune.stages import predictions as stages_predictions
from vlprune.stages import statistics, tuned
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.stage import Bench, obtain
from vlprune.store import doing
from vlprune.store.artifacts import intact, read_note, write_note
from vlprune.store.record import load_records


@pytest.fixture
def config(dataset, tmp_path):
    """A run of seconds on a small model in a directory and a small data set."""
    model = small_model("xvlm")
    save_model(model, tmp_path / "model")
    return RunConfig(
        model=ModelConfig(str(tmp_path / "model")),
        calibration=CalibrationConfig(str(dataset), n_batches=2, batch_size=4),
        pruning=PruningConfig("omp", 0.75),
        finetuning=FinetuningConfig(steps=2, batch_size=4),
        task=TaskConfig("retrieval", str(dataset), options=Options(k_test=10)),
    )


def pruned(config, method, sparsity=0.75):
    few = {
        "itersnip": {"steps": 2, "step_batches": 1},
        "chita++": {"steps": 2, "step_batches": 1},
        "tamt": {"steps": 2},
    }
    return replace(config, pruning=PruningConfig(method, sparsity, options=Options(few.get(method))))


def of_task(config, name, **options):
    return replace(config, task=replace(config.task, name=name, options=Options(options)))


@pytest.fixture
def execution(tmp_path):
    return Execution(store=tmp_path / "results")


def predictions(record, execution):
    path = execution.store / "predictions" / f"{record.stages['predictions']}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", vp.PRUNERS)
def test_every_method_prunes_exactly_through_the_whole_run(config, method, execution):
    record = run(pruned(config, method), execution)
    n_edges = small_model("xvlm").graph.n_edges
    assert record.sparsity == pytest.approx(round(0.75 * n_edges) / n_edges, abs=1e-12)
    assert record.peak_memory > 2**20
    assert {"masks", "tuned", "predictions", "record"} <= set(record.seconds)
    assert set(record.stages) == {"masks", "tuned", "predictions", "settings"}
    assert load_records(execution.store) == [record]


def test_the_record_counts_the_zeros_of_every_layer_as_its_masks_do(config, execution):
    record = run(pruned(config, "snip"), execution)
    masks = vp.load_masks(execution.store / "cache" / "masks" / f"{record.stages['masks']}.safetensors")
    layers = {layer.name: layer for layer in small_model("xvlm").graph}
    assert {name: own["zeros"] for name, own in record.layers.items()} == {n: int((~m).sum()) for n, m in masks.items()}
    assert all(own["weights"] == layers[name].n_edges for name, own in record.layers.items())
    for modality, fraction in record.modality_sparsity.items():
        own = [(~masks[name]).float() for name, layer in layers.items() if layer.modality == modality]
        assert fraction == pytest.approx(torch.cat([each.flatten() for each in own]).mean().item(), abs=1e-6)
    assert set(record.modality_sparsity) == {"vision", "text", "fusion"}


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_every_task_stores_what_each_image_has_to_do_with_its_metrics(task, config, execution):
    options = {"max_length": 8} if task == "captioning" else {}
    record = run(of_task(pruned(config, "omp"), task, **options), execution)
    images = vp.load_per_image(execution.store)
    means = images.groupby("metric", observed=True).value.mean()
    assert dict(means) == pytest.approx(record.metrics, rel=1e-6, abs=1e-6)
    assert images.image_id.nunique() == len({row["image_id"] for row in vp.load_pairs(config.task.data, "test")})


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_every_task_scores_a_dense_run_without_a_store(config, task):
    options = {"max_length": 8} if task == "captioning" else {}
    record = run(of_task(replace(config, pruning=PruningConfig()), task, **options))
    assert record.sparsity == 0
    assert get_task(task).headline in record.metrics
    assert record.floors
    assert set(record.stages) == {"tuned", "predictions", "settings"}


def test_a_statistic_is_measured_once_for_all_methods(config, execution, monkeypatch):
    passes, collect = [], statistics.collect
    monkeypatch.setattr(statistics, "collect", lambda *a, **k: passes.append(a[2]) or collect(*a, **k))
    for method in ("omp", "multiflow", "snip", "multiflow", "wanda", "obd"):
        for sparsity in (0.63, 0.9):
            run(pruned(config, method, sparsity), execution)
    assert passes == [{"input_sq"}, {"grad"}, {"grad_sq"}]


def test_what_is_missing_is_measured_in_one_pass(config, execution, monkeypatch):
    passes, collect = [], statistics.collect
    monkeypatch.setattr(statistics, "collect", lambda *a, **k: passes.append(a[2]) or collect(*a, **k))
    run(pruned(config, "multiflow"), execution)
    chains = [chain(pruned(config, method), Fingerprints()) for method in ("multiflow", "snip", "obd", "snip")]
    stages = [stage for own in chains for stage in own.statistics]
    found = obtain(stages, Bench(execution))
    assert passes == [{"input_sq"}, {"grad", "grad_sq"}]
    assert [set(own[next(iter(own))]) for own in found] == [{"input_sq"}, {"grad"}, {"grad_sq"}, {"grad"}]


def test_the_same_run_gives_the_same_numbers(config, tmp_path):
    ways = [Execution(store=tmp_path / name) for name in ("a", "b")]
    a, b = (run(pruned(config, "snip", 0.5), way) for way in ways)
    assert (a.metrics, a.layers, a.stages) == (b.metrics, b.layers, b.stages)
    assert predictions(a, ways[0]) == predictions(b, ways[1])
    assert run(pruned(config, "snip", 0.5)).metrics == a.metrics


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
    with pytest.raises(ValueError, match="options of captioning: unknown key 'beams'"):
        vp.evaluate(model, task="captioning", data=str(dataset), options={"beams": 2})


def test_evaluation_without_preparation_needs_no_training_examples(dataset):
    path = dataset / "dataset_small.json"
    images = json.loads(path.read_text())["images"]
    path.write_text(json.dumps({"images": [image for image in images if image["split"] == "test"]}))
    assert "tr_r1" in vp.evaluate(small_model("blip"), task="retrieval", data=str(dataset))
    assert "cider" in vp.evaluate(small_model("blip"), task="captioning", data=str(dataset), options={"max_length": 6})


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
        vp.compute_masks(model, "itersnip", 0.5, batches=batches, options={"steps": 2})
    assert all(torch.equal(model.weight(name), weight) for name, weight in before.items())


@pytest.fixture
def finetuned(monkeypatch):
    """(model, examples, losses) of every fine-tuning."""
    found, own = [], tuned.finetune

    def finetune(model, masks, layer_of, examples, *others, **more):
        found.append((model, examples, own(model, masks, layer_of, examples, *others, **more)))
        return found[-1][2]

    monkeypatch.setattr(tuned, "finetune", finetune)
    return found


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_stored_masks_and_weights_give_the_same_numbers(task, config, finetuned, execution):
    """With dropout, random captions and augmentation."""
    model = small_model("xvlm")
    text = {**model.config["text"], "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    save_model(build_model({**model.config, "text": text}, model.tokenizer), Path(config.model.name))
    own = replace(
        of_task(pruned(config, "snip", 0.5), task),
        finetuning=FinetuningConfig(epochs=1, batch_size=10, device_batch=6, augment="paper"),
    )
    own = replace(own, task=replace(own.task, image_size=48))
    keeping = replace(execution, keep_weights="all")
    record, stages = run(own, keeping), chain(own, Fingerprints())
    said = predictions(record, keeping)

    def again(*kinds):
        for stage in (getattr(stages, kind) for kind in (*kinds, "predictions", "record")):
            stage.path(keeping.store).unlink()
        other = run(own, keeping)
        assert (other.metrics, other.layers) == (record.metrics, record.layers)
        assert predictions(other, keeping) == said

    again()  # from the stored weights
    assert len(finetuned) == 1
    again("tuned")  # from the stored masks
    again("tuned", "masks")
    other = run(replace(own, seed=1), keeping)
    losses = [losses for _, _, losses in finetuned]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert record.layers != other.layers
    assert record.sparsity == pytest.approx(0.5, abs=1e-5)
    assert [model.image.size for model, _, _ in finetuned] == [48] * 4


@pytest.mark.parametrize("family", ["blip", "xvlm"])
@pytest.mark.parametrize("method", ["dense", "omp", "chita"])
def test_tuned_weights_come_back_bit_identical_and_sparse(family, method, config, execution):
    save_model(small_model(family), Path(config.model.name))
    own = of_task(replace(config, pruning=PruningConfig()) if method == "dense" else pruned(config, method, 0.9), "vqa")
    stage, bench = chain(own, Fingerprints()).tuned, Bench(execution)
    [fresh], [stored] = obtain([stage], bench), obtain([stage], bench)
    assert fresh is not stored
    a, b = fresh.model.state_dict(), stored.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not stored.model.training
    prunable = fresh.model.graph.n_edges
    rest = sum(p.numel() for p in fresh.model.parameters()) - prunable
    if method != "dense":
        kept = 4 * 0.1 * prunable + prunable / 8
        assert stage.path(execution.store).stat().st_size < 1.3 * (kept + 4 * rest) + 40_000


@pytest.mark.parametrize(("keep", "left"), [(None, False), ("all", True), ("none", False)])
def test_weights_stay_as_long_as_they_are_asked_to(config, execution, finetuned, keep, left):
    own = replace(execution, keep_weights=keep)
    run(config, own)
    stage = chain(config, Fingerprints()).tuned
    assert intact(stage.path(own.store)) == left
    assert read_note(stage.path(own.store)) is not None
    # Another number of candidates: only kept weights spare the training.
    other = replace(config, task=replace(config.task, options=Options(k_test=11)))
    run(other, replace(execution, keep_weights=None))
    assert len(finetuned) == (1 if left else 2)
    assert intact(stage.path(own.store)) == left


def test_another_metric_version_evaluates_without_training_or_predicting(config, execution, finetuned, monkeypatch):
    record = run(config, execution)
    task = get_task("retrieval")

    def score(predictions, examples):
        return {name: value + 1 for name, value in task.score(predictions, examples).items()}

    def predict(*_):
        raise AssertionError("predicted again")

    monkeypatch.setitem(eval.TASKS, "retrieval", replace(task, score=score))
    other = run(config, execution)
    assert other.key != record.key
    assert other.stages == record.stages | {"settings": other.stages["settings"]}
    assert other.metrics == {name: value + 1 for name, value in record.metrics.items()}
    assert len(finetuned) == 1


def test_epochs_count_captions_and_steps_count_images(config, finetuned, execution):
    run(config, execution)
    run(replace(config, finetuning=FinetuningConfig(epochs=1, batch_size=30)), execution)
    questions = of_task(config, "vqa")
    run(replace(questions, finetuning=FinetuningConfig(epochs=1, batch_size=30)), execution)
    assert [len(examples) for _, examples, _ in finetuned] == [12, 12 * 5, 12]
    assert [len(losses) for _, _, losses in finetuned] == [2, 2, 1]


def test_the_best_epoch_on_val_is_tested_once(config, monkeypatch):
    task, predicted, states, scores = get_task("retrieval"), [], [], [2.0, 3.0, 1.0]

    def predict(model, examples, *others):
        predicted.append(len(examples))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return task.predict(model, examples, *others)

    def score(predictions, examples):
        return {**task.score(predictions, examples), **({"r_mean": scores.pop()} if len(examples) == 4 else {})}

    monkeypatch.setitem(eval.TASKS, "retrieval", replace(task, predict=predict, score=score))
    record = run(replace(config, finetuning=FinetuningConfig(epochs=3, batch_size=30, select="best")))
    assert predicted == [4, 4, 4, 6]
    assert all(torch.equal(value, states[1][name]) for name, value in states[3].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[3].items())
    assert set(record.metrics) == set(task.metrics)


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_an_interrupted_run_goes_on_where_it_was(task, config, execution, finetuned, monkeypatch):
    """Stopped after each step of training and each part of the evaluation."""
    for name in ("retrieval", "captioning"):
        monkeypatch.setattr(f"eval.{name}.BATCH", 4)
    monkeypatch.setattr("eval.vqa.IMAGES", 4)
    own = of_task(replace(config, finetuning=FinetuningConfig(steps=4, batch_size=4)), task)
    whole = run(own, replace(execution, store=execution.store / "whole"))
    stops = 0
    while True:
        asked = iter(range(2))
        bench = Bench(execution, stopping=lambda asked=asked: next(asked, None) is None)
        try:
            [record] = obtain([chain(own, Fingerprints()).record], bench)
            break
        except Interrupted:
            stops += 1
            assert stops < 20
    assert stops >= 2
    assert record.metrics == whole.metrics
    assert predictions(record, execution) == predictions(whole, replace(execution, store=execution.store / "whole"))
    assert not list(execution.store.glob("cache/tuned/*.checkpoint*"))
    assert not list(execution.store.glob("predictions/*.parts"))


def test_what_a_process_that_was_killed_when_it_was_done_has_left_is_deleted(config, execution):
    config = of_task(config, "captioning", max_length=8)
    bench = Bench(replace(execution, keep_weights="all"))
    tuned = chain(config, Fingerprints()).tuned
    obtain([tuned], bench)
    left = [tuned.path(execution.store).with_suffix(suffix) for suffix in tuned.scratch]
    for path in left:
        path.touch()
    run(config, replace(execution, keep_weights="all"))
    assert len(left) == 2
    assert not any(path.exists() for path in left)


def test_a_run_says_at_which_step_it_is_and_how_long_the_rest_takes(config, execution, monkeypatch):
    said, now = [], SimpleNamespace(monotonic=lambda: 10.0 * len(said))
    monkeypatch.setattr(doing, "time", now)
    for module in (statistics, tuned, stages_predictions):
        monkeypatch.setattr(module, "say_step", lambda *step: doing.say_step(*step) or said.append(doing.doing()))
    monkeypatch.setattr("eval.captioning.BATCH", 2)
    run(pruned(of_task(config, "captioning", max_length=8), "multiflow"), execution)
    assert [re.sub(r"loss \d+\.\d{3}", "loss 1.234", words) for words in said] == [
        "calibration, batch 1 of 2",
        "calibration, batch 2 of 2, 0:10 left",
        "fine-tuning, step 0 of 2",
        "fine-tuning, step 1 of 2, loss 1.234, 0:10 left",
        "fine-tuning, step 2 of 2, loss 1.234, 0:00 left",
        "evaluation, part 1 of 3",
        "evaluation, part 2 of 3, 0:20 left",
        "evaluation, part 3 of 3, 0:10 left",
    ]


def test_the_losses_of_a_training_that_fails_are_stored_as_far_as_it_came(config, execution, caplog):
    caplog.set_level("INFO", "vlprune")
    own = replace(config, finetuning=replace(config.finetuning, steps=30, lr=1e30, clip=0.0))
    with pytest.raises(RuntimeError, match="not finite"):
        run(own, execution)
    [path] = execution.store.glob("cache/tuned/*.losses.csv")
    rows = [row.split(",") for row in path.read_text().splitlines()]
    assert [(step, rate) for step, _, rate in rows] == [("step", "lr"), ("1", "0"), ("2", "3.33333e+29")]
    assert f"the losses of 2 steps are in {path}" in caplog.text


def test_a_test_split_without_answers_is_predicted_and_not_scored(config, dataset, execution):
    (dataset / "test_annotations.json").unlink()
    record = run(of_task(config, "vqa"), execution)
    assert (record.metrics, record.floors) == ({}, {})
    said = predictions(record, execution)
    assert len(said) == 6
    assert {prediction["answer"] for prediction in said} <= {"yes", "no"}


def test_the_answer_list_of_the_data_is_ranked(config, dataset, execution):
    (dataset / "answer_list.json").write_text(json.dumps(["a dog", "no dog"]))
    record = run(of_task(config, "vqa"), execution)
    assert {prediction["answer"] for prediction in predictions(record, execution)} <= {"a dog", "no dog"}


def test_several_splits_are_trained_on(config, finetuned, execution):
    several = of_task(config, "vqa")
    record = run(replace(several, task=replace(several.task, train="train+val", test="val")), execution)
    assert len(finetuned[0][1]) == 12 + 4
    assert len(predictions(record, execution)) == 4


def test_broken_images_are_left_out_where_that_is_asked_for(config, dataset, execution):
    for name in ("0003.png", "0017.png"):  # of train and test
        (dataset / "images" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read image .*png"):
        run(pruned(config, "multiflow", 0.5), execution)
    record = run(pruned(config, "multiflow", 0.5), replace(execution, skip_broken=True))
    assert len(predictions(record, execution)) == 5 + 5 * 5
    assert record.left_out == {"train": 1, "test": 1}


def test_options_of_a_family_change_the_model_and_the_key(config, execution):
    own = of_task(replace(config, pruning=PruningConfig()), "captioning", max_length=8)
    prompted = replace(own, model=ModelConfig(config.model.name, Options(prompt="a dog ")))
    a, b = run(own, execution), run(prompted, execution)
    assert a.stages["tuned"] != b.stages["tuned"]
    with pytest.raises(ValueError, match="unknown key 'promt'; did you mean 'prompt'"):
        run(replace(own, model=ModelConfig(config.model.name, Options(promt="x"))), execution)


@pytest.mark.parametrize(("keep", "left"), [("all", True), ("best", True), (None, False), ("none", False)])
def test_weights_that_were_stored_for_a_while_go_or_stay_as_a_later_run_asks(config, execution, keep, left):
    run(config, replace(execution, keep_weights="all"))
    path = chain(config, Fingerprints()).tuned.path(execution.store)
    note = read_note(path)
    write_note(path, replace(note, facts={**note.facts, "temporary": True}), note.sha256)  # as a killed sweep leaves it
    run(replace(config, task=replace(config.task, options=Options(k_test=11))), replace(execution, keep_weights=keep))
    assert path.exists() == left


def test_weights_that_were_stored_for_a_while_stay_where_a_later_run_asks_for_them(config, execution, finetuned):
    run(config, replace(execution, keep_weights="all"))
    stage = chain(config, Fingerprints()).tuned
    path = stage.path(execution.store)
    note = read_note(path)
    write_note(path, replace(note, facts={**note.facts, "temporary": True}), note.sha256)  # as a killed sweep leaves it
    other = replace(config, task=replace(config.task, options=Options(k_test=11)))
    run(other, replace(execution, keep_weights="all"))
    run(replace(config, task=replace(config.task, options=Options(k_test=12))), execution)
    assert len(finetuned) == 1
    assert intact(path)


def test_metrics_that_cannot_be_computed_are_refused_before_training(config, finetuned):
    with pytest.raises(ValueError, match="k_test must be at least 10"):
        run(replace(config, task=replace(config.task, options=Options(k_test=5))))
    assert finetuned == []
