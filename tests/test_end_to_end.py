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

from vlprune.models.checkpoints import save_directory

TABLE = """
[base.calibration]
n_batches = 2
batch_size = 4
steps = 2
step_batches = 1
[base.finetuning]
steps = 3
batch_size = 4
[base.task]
k_test = 10
max_length = 8
[[grid]]
models = ["{model}"]
methods = ["multiflow", "chita++"]
sparsities = [0.75]
tasks = ["retrieval", "captioning", "vqa"]
"""


@pytest.fixture
def table(tmp_path):
    model = small_model("xvlm")
    save_directory(model, tmp_path / "model")
    path = tmp_path / "small.toml"
    path.write_text(TABLE.format(model=tmp_path / "model"))
    return path


def sweep(table: Path, data: Path, results: Path) -> subprocess.Popen:
    """The sweep as a process in a group of its own."""
    command = [sys.executable, "-m", "vlprune.sweep", table, "--data", data, "--results", results, "--jobs", "2"]
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
    save_directory(model, tmp_path / "model")
    assert "text_encoder.layer.0.output.dense.weight holds NaN" in output()
