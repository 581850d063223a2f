"""TensorBoard and Weights & Biases show runs, and nothing depends on them."""

import json
import struct
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
from conftest import small_model

from vlprune.config import (
    CalibrationConfig,
    ConfigError,
    FinetuningConfig,
    ModelConfig,
    Options,
    PruningConfig,
    RunConfig,
    TaskConfig,
)
from vlprune.execution import Execution, Interrupted
from vlprune.models import save_model
from vlprune.pipeline import chain, run
from vlprune.stages import tracking
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.stage import Bench, obtain
from vlprune.sweep.options import Options as SweepOptions

STEPS = 5


@pytest.fixture
def config(dataset, tmp_path):
    save_model(small_model("xvlm"), tmp_path / "model")
    return RunConfig(
        model=ModelConfig(str(tmp_path / "model")),
        calibration=CalibrationConfig(str(dataset), n_batches=2, batch_size=4),
        pruning=PruningConfig("omp", 0.75),
        finetuning=FinetuningConfig(steps=STEPS, batch_size=4),
        task=TaskConfig("retrieval", str(dataset), options=Options(k_test=10)),
    )


def events(directory):
    """What TensorBoard shows of a training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    return found


def interrupted_after(steps, config, execution):
    """Makes a run until so many steps of its training are done."""
    left = iter(range(steps - 1))
    with pytest.raises(Interrupted, match="fine-tuning stopped"):
        obtain([chain(config, Fingerprints()).record], Bench(execution, stopping=lambda: next(left, None) is None))


def losses(record, execution):
    """{step: (loss, learning rate)} of a run."""
    rows = (execution.store / "runs" / record.key / "losses.csv").read_text().splitlines()[1:]
    return {int(step): (float(loss), float(rate)) for step, loss, rate in (row.split(",") for row in rows)}


def test_tensorboard_shows_one_curve_of_an_interrupted_training_and_the_metrics(config, tmp_path):
    plain = run(config, Execution(store=tmp_path / "plain"))
    execution = Execution(store=tmp_path / "tracked", track=("tensorboard",))
    interrupted_after(3, config, execution)
    [directory] = (execution.store / "tensorboard").iterdir()
    assert [event.step for event in events(directory).Scalars("training/loss")] == [1, 2, 3]
    # Steps that were tracked after the last checkpoint, which a killed process leaves.
    tracker = tracking.TensorBoard(tracking.Training(config, plain.stages["tuned"], execution.store, goes_on=4))
    tracker.step({"training/loss": 7.0, "training/lr": 7.0}, 4)
    tracker.close()

    record = run(config, execution)
    assert (record.key, record.metrics, record.stages) == (plain.key, plain.metrics, plain.stages)
    assert [directory] == list((execution.store / "tensorboard").iterdir())
    assert directory.name == f"model_omp@75%_retrieval_seed_0_{record.stages['tuned']}"
    shown = events(directory)
    own = losses(record, execution)
    for number, name in enumerate(("training/loss", "training/lr")):
        curve = {event.step: event.value for event in shown.Scalars(name)}
        assert curve == pytest.approx({step: values[number] for step, values in own.items()}, rel=1e-4)
        assert len(shown.Scalars(name)) == STEPS
    metrics = {name: shown.Scalars(f"test k_test=10/{name}") for name in record.metrics}
    assert {name: [(event.step, event.value) for event in found] for name, found in metrics.items()} == {
        name: [(STEPS, pytest.approx(value, rel=1e-6))] for name, value in record.metrics.items()
    }
    [text] = shown.Tensors("settings/text_summary")
    [settings] = text.tensor_proto.string_val
    assert "    pruning.sparsity = 0.75\n" in settings.decode()
    assert "    task.options.k_test = 10" in settings.decode()


def test_another_evaluation_is_shown_with_the_same_training(config, tmp_path):
    execution = Execution(store=tmp_path, track=("tensorboard",), keep_weights="all")
    run(config, execution)
    run(replace(config, task=replace(config.task, options=Options(k_test=12))), execution)
    [directory] = (tmp_path / "tensorboard").iterdir()
    tags = events(directory).Tags()["scalars"]
    assert {"training/loss", "training/lr", "test k_test=10/tr_r1", "test k_test=12/tr_r1"} < set(tags)


def test_a_tracker_that_fails_is_one_warning_and_no_failed_run(config, tmp_path, monkeypatch, caplog):
    class Failing(tracking.TensorBoard):
        def step(self, values, step):
            if step == 2:
                raise OSError("no network")
            super().step(values, step)

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Failing)
    plain = run(config, Execution(store=tmp_path / "plain"))
    caplog.clear()
    record = run(config, Execution(store=tmp_path / "tracked", track=("tensorboard",)))
    assert record.metrics == plain.metrics
    assert [own.getMessage() for own in caplog.records if own.levelname == "WARNING"] == [
        "tracking with tensorboard failed, and the run goes on without: OSError: no network"
    ]


def wandb_records(path):
    """The records of a file of Weights & Biases, which is a log of LevelDB after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block
            at += 2**15 - at % 2**15
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : (at := at + 7 + length)]
        if part in (1, 4):  # whole, or the last
            yield Record.FromString(whole)
            whole = b""


def test_wandb_has_a_run_for_each_training(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    plain = run(config, Execution(store=tmp_path / "plain"))
    execution = Execution(store=tmp_path / "tracked", track=("wandb",))
    interrupted_after(3, config, execution)
    record = run(config, execution)
    assert (record.key, record.metrics, record.stages) == (plain.key, plain.metrics, plain.stages)

    curve, summary, key = {}, {}, record.stages["tuned"]
    paths = sorted(tmp_path.glob(f"tracked/wandb/offline-run-*/run-{key}.wandb"))
    assert len(paths) == 3  # until the interruption, until the end, the metrics
    for path in paths:
        for own in wandb_records(path):
            if own.HasField("run"):
                assert (own.run.run_id, own.run.project) == (key, "vlprune")
                assert own.run.display_name == "model omp@75% retrieval seed 0"
                settings = {item.key: item.value_json for item in own.run.config.update}
                assert settings["pruning.sparsity"] == "0.75"
            values = {item.nested_key[0]: json.loads(item.value_json) for item in own.history.item if item.nested_key}
            if values:
                assert values["_step"] not in curve
                curve[values["_step"]] = values["training/loss"], values["training/lr"]
            summary |= {item.key: json.loads(item.value_json) for item in own.summary.update if item.key}
    assert curve == {step: pytest.approx(values, rel=1e-4) for step, values in losses(record, execution).items()}
    assert list(curve) == [1, 2, 3, 4, 5]
    assert {name: value for name, value in summary.items() if name.startswith("test")} == {
        f"test k_test=10/{name}": value for name, value in record.metrics.items()
    }


def test_a_tracker_that_is_unknown_or_not_installed_is_one_line_before_anything_runs(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        _ = SweepOptions(track="tensorbord").execution
    # A directory, such as the runs of Weights & Biases are in, is no package.
    found = {"tensorboard": find_spec("tensorboard"), "wandb": ModuleSpec("wandb", None)}
    monkeypatch.setattr("vlprune.execution.find_spec", found.get)
    assert SweepOptions(track="tensorboard").execution.track == ("tensorboard",)
    with pytest.raises(ConfigError, match=r"tracking with wandb needs wandb: pip install 'vlprune\[track\]'"):
        _ = SweepOptions(track="tensorboard, wandb").execution
    with pytest.raises(ConfigError, match="tracking with tensorboard needs a store"):
        Execution(store=None, track=("tensorboard",))
