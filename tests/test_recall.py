"""What a finished sweep needs to print its table again: its results, and nothing of models and data."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import fake_pipeline
import pytest
from conftest import small_model, write_dataset
from rich.console import Console

from vlprune.models import save_model
from vlprune.store.artifacts import Note, written
from vlprune.store.lease import lease_path
from vlprune.store.place import place
from vlprune.store.record import RECORD, load_records, run_directory
from vlprune.store.weights import TEMPORARY, weights_path
from vlprune.sweep.command import sweep
from vlprune.sweep.local import local_pool
from vlprune.sweep.options import Options
from vlprune.sweep.planner import Planner

TABLE = """
[[grid]]
models = ["{model}"]
methods = ["omp"]
sparsities = [0.5, 0.75]
tasks = ["retrieval"]
"""


class CountingPlanner(Planner):
    """Counts how often it is asked for a plan."""

    def __init__(self):
        self.asked = 0

    def plan(self, options):
        self.asked += 1
        return super().plan(options)

    def check(self, configs, *, skip_broken):
        return []


@pytest.fixture
def options(tmp_path, monkeypatch):
    """A sweep of a model and data in files."""
    monkeypatch.setattr("vlprune.store.identity.SETTLED", 0.0)
    save_model(small_model("xvlm"), tmp_path / "model")
    table = tmp_path / "t.toml"
    table.write_text(TABLE.format(model=tmp_path / "model"))
    return Options(table=table, results=tmp_path / "results", data=write_dataset(tmp_path / "data"), jobs=1)


def go(options, planner):
    console = Console(file=io.StringIO(), width=160)
    assert sweep(options, planner, partial(local_pool, fake_pipeline.work), console) == 0
    return console.file.getvalue()


def test_a_finished_sweep_is_printed_without_a_plan(options):
    planner = CountingPlanner()
    first, second = go(options, planner), go(options, planner)
    assert planner.asked == 1
    assert "t: 3 runs, 3 done" in second
    table = first[first.index("R mean") :]
    assert table.split("wrote", 1)[1] == second.split("wrote", 1)[1]
    assert "omp" in second


def leave_weights(path, temporary):
    with written(path, Note(facts={TEMPORARY: temporary})) as half:
        half.touch()


def test_weights_that_a_killed_sweep_left_are_deleted_and_those_that_are_kept_are_not(options):
    planner = CountingPlanner()
    go(options, planner)
    paths = [weights_path(options.results, record) for record in load_records(options.results)]
    for number, path in enumerate(paths):
        leave_weights(path, temporary=number > 0)
    go(options, planner)
    assert planner.asked == 1
    assert [path.exists() for path in paths] == [True, False, False]


def test_leases_that_killed_workers_left_at_finished_runs_are_deleted(options):
    go(options, CountingPlanner())
    leases = [lease_path(run_directory(options.results, own.key) / RECORD) for own in load_records(options.results)]
    told = {"token": "t", "place": place(), "pid": 999999999, "host": "here", "since": 0.0, "doing": ""}

    def leave():
        for path in leases:
            path.write_text(json.dumps(told))

    leave()
    planner = CountingPlanner()
    go(options, planner)
    assert planner.asked == 0
    assert not any(path.exists() for path in leases)
    leave()
    next((options.results / "cache" / "plans").iterdir()).unlink()  # what was planned is not known any more
    go(options, planner)
    assert planner.asked == 1
    assert not any(path.exists() for path in leases)


def test_a_sweep_that_goes_on_deletes_the_weights_that_nothing_waits_for(options):
    planner = Planner()
    planned, _ = planner.plan(options)
    go(replace(options, sparsities="0.5"), CountingPlanner())
    done = planned.done(options.results)
    for run in planned.runs:
        leave_weights(options.results / run.tuned.file, temporary=True)
    files = {run.key: options.results / run.tuned.file for run in planned.runs}

    def look(work, options, execution, planner, most):
        assert {key for key, path in files.items() if not path.exists()} == done
        return local_pool(work, options, execution, planner, most)

    console = Console(file=io.StringIO(), width=160)
    assert sweep(options, CountingPlanner(), partial(look, fake_pipeline.work), console) == 0
    assert len(done) == 2
    assert not any(path.exists() for path in files.values())


def rewrite(path):
    path.write_bytes(path.read_bytes())


def replace_weights(options):
    rewrite(options.table.parent / "model" / "model.safetensors")


def change_annotations(options):
    path = next(options.data.glob("*.json"))
    path.write_text(path.read_text().replace("a", "b", 1))


def add_a_file(options):
    (options.data / "images" / "new.jpg").write_bytes(b"")


def change_table(options):
    options.table.write_text(options.table.read_text().replace("0.75", "0.9"))


def lose_a_record(options):
    next((options.results / "runs").glob("*/record.json")).unlink()


def damage_what_was_remembered(options):
    next((options.results / "cache" / "plans").iterdir()).write_text("{}")


@pytest.mark.parametrize(
    "change",
    [replace_weights, change_annotations, add_a_file, change_table, lose_a_record, damage_what_was_remembered],
)
def test_what_has_changed_since_is_planned_anew(options, change):
    planner = CountingPlanner()
    go(options, planner)
    change(options)
    go(options, planner)
    assert planner.asked == 2


def test_other_options_are_another_sweep(options):
    planner = CountingPlanner()
    go(options, planner)
    assert "2 runs, 2 done" in go(replace(options, sparsities="0.5"), planner)
    assert planner.asked == 2


def test_edited_code_is_planned_anew(options, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "method.py").write_text("score = abs\n")
    monkeypatch.setattr("vlprune.sweep.recall.PACKAGES", (package,))
    planner = CountingPlanner()
    go(options, planner)
    go(options, planner)
    assert planner.asked == 1
    (package / "method.py").write_text("score = sum\n")
    go(options, planner)
    assert planner.asked == 2


def test_files_that_change_at_the_moment_are_not_relied_on(options, monkeypatch):
    monkeypatch.setattr("vlprune.store.identity.SETTLED", 3600.0)
    planner = CountingPlanner()
    go(options, planner)
    go(options, planner)
    assert planner.asked == 2


def test_the_command_prints_a_finished_sweep_without_torch(options):
    go(options, CountingPlanner())
    command = [sys.executable, "-X", "importtime", "-m", "vlprune.sweep", str(options.table)]
    arguments = ["--data", str(options.data), "--results", str(options.results), "--jobs", "1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs, 3 done" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vlprune.sweep.command" in imported
    assert not imported & {"torch", "transformers", "datasets", "vlprune.sweep.planner", "fsspec", "s3fs"}
