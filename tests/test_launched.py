"""One run on several devices: sweeps under a launcher, with two processes on the processor, and everything real."""

import json
import os
import signal
import subprocess
import sys
import time

import fake_pipeline
import psutil
import pytest
import torch
from conftest import small_model
from test_end_to_end import numbers

from vlprune.config import ConfigError
from vlprune.execution import Execution
from vlprune.models import save_model
from vlprune.stages.fingerprints import Fingerprints
from vlprune.store.masks import load_masks
from vlprune.sweep.engine import execute
from vlprune.sweep.launched import launched_pool, team_of
from vlprune.sweep.local import LocalPool
from vlprune.sweep.options import Options
from vlprune.sweep.planner import Planner, plan
from vlprune.sweep.table import load_table

TABLE = """
[base.calibration]
n_batches = 2
batch_size = 4
[base.finetuning]
steps = {steps}
batch_size = 4
[task.captioning]
task.options.max_length = 8
[[grid]]
models = ["{model}"]
methods = ["multiflow"]
sparsities = [0.75]
tasks = [{tasks}]
"""
TASKS = '"retrieval", "captioning", "vqa"'
ALONE = [sys.executable]
TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


@pytest.fixture
def model(tmp_path):
    save_model(small_model("xvlm"), tmp_path / "model")
    return tmp_path / "model"


def table(tmp_path, model, tasks=TASKS, steps=3):
    path = tmp_path / "small.toml"
    path.write_text(TABLE.format(model=model, tasks=tasks, steps=steps))
    return path


def sweep(launcher, *more):
    return subprocess.Popen(
        [*launcher, "-m", "vlprune.sweep", *map(str, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def records(results):
    """{key: record} of all finished runs."""
    found = [json.loads(path.read_text()) for path in (results / "runs").glob("*/record.json")]
    return {record["key"]: record for record in found}


def test_two_processes_make_the_masks_losses_and_metrics_of_one(tmp_path, dataset, model):
    text = {}
    for name, launcher in (("alone", ALONE), ("together", TWO)):
        process = sweep(launcher, table(tmp_path, model), "--data", dataset, "--results", tmp_path / name)
        text[name], _ = process.communicate(timeout=300)
        assert process.returncode == 0, text[name]
    assert text["together"].count("6 runs finished, 0 failed") == 1
    alone, together = tmp_path / "alone", tmp_path / "together"
    [one], [other] = (list(path.glob("cache/masks/*.safetensors")) for path in (alone, together))
    assert one.name == other.name
    assert all(torch.equal(mask, load_masks(one)[layer]) for layer, mask in load_masks(other).items())
    expected, found = records(alone), records(together)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert record["metrics"] == pytest.approx(expected[key]["metrics"], abs=1e-6)
        assert record["sparsity"] == expected[key]["sparsity"]
        assert record["origins"]["tuned"]["device"] == f"2 × {expected[key]['origins']['tuned']['device']}"
        assert record["origins"]["record"]["device"] == expected[key]["origins"]["record"]["device"]
        rows, others = ((path / "runs" / key / "losses.csv").read_text().splitlines()[1:] for path in (alone, together))
        assert len(rows) == len(others) == 3
        for row, other in zip(rows, others):
            assert [float(x) for x in other.split(",")] == pytest.approx([float(x) for x in row.split(",")], rel=2e-5)
    assert not [path for path in together.rglob("*") if path.suffix in (".lease", ".parts", ".checkpoint")]


def wait_for(condition, process, seconds=200.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def test_a_launched_sweep_that_is_stopped_goes_on_from_its_checkpoint(tmp_path, dataset, model):
    own, results = table(tmp_path, model, '"retrieval"', steps=60), tmp_path / "results"
    more = [own, "--data", dataset, "--results", results, "--methods", "dense"]
    stopped = sweep(TWO, *more, "--checkpoint-seconds", "0")
    wait_for(lambda: list(results.glob("cache/tuned/*.checkpoint")), stopped)
    stopped.send_signal(signal.SIGTERM)
    text, _ = stopped.communicate(timeout=100)
    assert "the same command goes on from here" in text
    assert list(results.glob("cache/tuned/*.checkpoint"))
    assert numbers(results) == {}
    assert not list(results.glob("runs/*/error.txt"))
    again = sweep(TWO, *more)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    [log] = results.glob("runs/*/log.txt")
    assert log.read_text().count("fine-tuning goes on from step") == 1
    assert len(numbers(results)) == 1


def test_several_runs_at_once_do_not_go_together_with_a_launcher():
    work, options, execution = fake_pipeline.work, Options(jobs=2), Execution()
    with pytest.raises(ConfigError, match=r"^--jobs 2 is for several runs at once; launched processes share one run$"):
        launched_pool(work, options, execution, Planner(), 1, size=2, assist=work)


SMALL = """
[[grid]]
models = ["tiny-blip"]
methods = ["omp", "lamp", "snip"]
sparsities = [0.9]
tasks = ["retrieval"]
"""


def team(tmp_path, size=2):
    """The events of a table whose runs a team of two does, by stages that need no model."""
    path = tmp_path / "t.toml"
    path.write_text(SMALL)
    own = plan(load_table(path), Fingerprints())
    hire = team_of(size, (), fake_pipeline.assist_noted)
    execution = Execution(store=tmp_path)
    pool = LocalPool(fake_pipeline.work_convening, execution, 1, hire=hire)
    return list(execute(own.jobs(own.runs, tmp_path), pool, execution))


def test_an_error_of_one_rank_ends_its_job_in_all_and_no_other_job(tmp_path):
    """OMP's second rank raises; of LAMP, the first rank is killed and then the second: the others would wait."""
    before = set(psutil.Process().children(recursive=True))
    events = [(event.kind, event.job.configs[0].pruning.method, event.message) for event in team(tmp_path)]
    ends = [event for event in events if event[0] != "started"]
    assert ends == [
        ("finished", "dense", ""),
        ("failed", "omp", "rank 1: RuntimeError: no luck"),
        ("retried", "lamp", "rank 0: the worker was killed by SIGKILL (out of memory?)"),
        (
            "failed",
            "lamp",
            "rank 1: the worker was killed by SIGKILL (out of memory?), 2 times; its output is in log.txt",
        ),
        ("finished", "snip", ""),
    ]
    errors = sorted(path.read_text().splitlines()[0] for path in tmp_path.glob("runs/*/error.txt"))
    assert errors == sorted(message for kind, _, message in ends if kind == "failed")
    assert (tmp_path / "notes" / "snip-1-of-2").exists()
    left = set(psutil.Process().children(recursive=True)) - before
    assert [child for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []


def test_a_team_needs_a_device_for_each_process_of_one_machine(monkeypatch):
    with pytest.raises(ConfigError, match=r"^3 processes were launched, .*; there are 2: 0, 1"):
        team_of(3, ("0", "1"), fake_pipeline.work)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="of 4 launched processes 2 are on this one"):
        team_of(4, (), fake_pipeline.work)
