"""The command line on small models and data, with everything real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import small_model

from vlprune.models import save_model

TABLE = """
[base.calibration]
n_batches = 2
batch_size = 4
[base.finetuning]
steps = 3
batch_size = 4
[task.captioning]
task.options.max_length = 8
[method."chita++"]
pruning.options = {{steps = 2, step_batches = 1}}
[[grid]]
models = ["{model}"]
methods = ["multiflow", "chita++"]
sparsities = [0.75]
tasks = ["retrieval", "captioning", "vqa"]
"""


@pytest.fixture
def table(tmp_path):
    model = small_model("xvlm")
    save_model(model, tmp_path / "model")
    path = tmp_path / "small.toml"
    path.write_text(TABLE.format(model=tmp_path / "model"))
    return path


def sweep(table: Path, data: Path, results: Path, *more: str) -> subprocess.Popen:
    """The sweep as a process in a group of its own."""
    command = [sys.executable, "-m", "vlprune.sweep", table, "--data", data, "--results", results, "--jobs", "2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def numbers(results: Path) -> dict[str, dict]:
    """{key: metrics} of all finished runs."""
    records = [json.loads(path.read_text()) for path in (results / "runs").glob("*/record.json")]
    return {record["key"]: record["metrics"] for record in records}


def test_a_killed_sweep_ends_with_the_same_tables(table, dataset, tmp_path):
    whole = sweep(table, dataset, tmp_path / "whole")
    text, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, text
    assert "9 runs finished, 0 failed" in text

    killed = sweep(table, dataset, tmp_path / "killed")
    end = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("runs/*/record.json")):
        assert time.monotonic() < end
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert 1 <= len(numbers(tmp_path / "killed")) < 9

    # A cache file that was cut short is made again.
    for path in (tmp_path / "killed" / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-20])
    again = sweep(table, dataset, tmp_path / "killed")
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    for name in ("small.md", "small.csv"):
        tables = [(tmp_path / run / "tables" / name).read_text() for run in ("killed", "whole")]
        assert tables[0] == tables[1]


def test_what_cannot_be_read_is_said_once_before_anything_runs(table, dataset, tmp_path):
    def output() -> str:
        process = sweep(table, dataset, tmp_path / "results")
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 2, text
        assert not list((tmp_path / "results").glob("runs/*/record.json"))
        return text.strip().splitlines()[-1]

    (dataset / "images" / "0003.png").rename(tmp_path / "away.png")
    assert "0003.png" in output()
    (tmp_path / "away.png").rename(dataset / "images" / "0003.png")
    model = small_model("xvlm")
    with torch.no_grad():
        model.weight("text_encoder.layer.0.output.dense")[0, 0] = float("nan")
    save_model(model, tmp_path / "model")
    assert "text_encoder.layer.0.output.dense.weight holds NaN" in output()


LONG = (
    TABLE.replace("steps = 3", "steps = 60")
    .replace('"multiflow", "chita++"', '"omp"')
    .replace('"retrieval", "captioning", "vqa"', '"retrieval"')
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_stopped_in_fine_tuning_goes_on_from_its_checkpoint(table, dataset, tmp_path, how):
    table.write_text(LONG.format(model=tmp_path / "model"))
    whole = sweep(table, dataset, tmp_path / "whole")
    text, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, text

    results = tmp_path / "stopped"
    seconds = "0" if how == signal.SIGKILL else "1000"
    stopped = sweep(table, dataset, results, "--checkpoint-seconds", seconds)
    end = time.monotonic() + 200
    begun = "cache/tuned/*.checkpoint" if how == signal.SIGKILL else "cache/tuned/*.lease"
    while not list(results.glob(begun)):
        assert time.monotonic() < end
        assert stopped.poll() is None
        time.sleep(0.02)
    if how == signal.SIGTERM:
        time.sleep(1.0)  # into the training
    os.killpg(stopped.pid, how) if how == signal.SIGKILL else stopped.send_signal(how)
    text, _ = stopped.communicate(timeout=100)
    if how == signal.SIGTERM:
        assert stopped.returncode == 128 + signal.SIGTERM
        assert "the same command goes on from here" in text
    assert numbers(results) == {}
    assert list(results.glob("cache/tuned/*.checkpoint"))

    again = sweep(table, dataset, results)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert numbers(results) == numbers(tmp_path / "whole")
    logs = [path.read_text() for path in results.glob("runs/*/log.txt")]
    assert any("fine-tuning goes on from step" in log for log in logs)
    assert not list(results.glob("cache/tuned/*.checkpoint*"))


def test_a_run_whose_data_change_under_it_fails_and_stores_nothing(table, dataset, tmp_path):
    table.write_text(LONG.format(model=tmp_path / "model"))
    results = tmp_path / "results"
    process = sweep(table, dataset, results)
    end = time.monotonic() + 200
    while not list(results.glob("cache/tuned/*.lease")):  # none of the two has finished when the first one starts
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    path = dataset / "dataset_small.json"
    path.write_text(path.read_text().replace("a dog number 1", "a cat number 1"))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1, text
    assert "have changed since it was planned" in text
    assert numbers(results) == {}
    assert not list(results.glob("cache/tuned/*.safetensors"))


def test_two_sweeps_at_once_do_the_work_of_one(table, dataset, tmp_path):
    whole = sweep(table, dataset, tmp_path / "whole")
    pair = [sweep(table, dataset, tmp_path / "shared") for _ in range(2)]
    for process in (whole, *pair):
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        assert "9 runs finished, 0 failed" in text
    assert numbers(tmp_path / "shared") == numbers(tmp_path / "whole")
    logs = [path.read_text() for path in (tmp_path / "shared").rglob("*log.txt")]
    assert sum(log.count("fine-tuning begins") for log in logs) == 9
    left = [path.name for path in (tmp_path / "shared").rglob("*")]
    assert not [name for name in left if name.endswith((".lease", ".tmp", ".parts", ".checkpoint"))]
    losses = next((tmp_path / "shared").glob("runs/*/losses.csv")).read_text().splitlines()
    assert losses[0] == "step,loss,lr"
    assert len(losses) == 1 + 3


def test_another_number_of_candidates_is_evaluated_without_another_training(table, dataset, tmp_path):
    text = LONG.format(model=tmp_path / "model").replace("steps = 60", "steps = 2")
    table.write_text(text + "task.options.k_test = [10, 12]\n")
    process = sweep(table, dataset, tmp_path / "results")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "4 runs finished, 0 failed" in text
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("runs/*/record.json")]
    assert len({record["stages"]["tuned"] for record in records}) == 2
    assert len({record["stages"]["predictions"] for record in records}) == 4
    assert len(list(tmp_path.glob("results/cache/tuned/*.note"))) == 2
    assert not list(tmp_path.glob("results/cache/tuned/*.safetensors"))
