import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_pipeline
import psutil
import pytest
from fake_pipeline import catalogue

from vlprune.store.record import load_records, read_record, run_directory
from vlprune.sweep.engine import choose, cuda_devices, execute, schedule
from vlprune.sweep.table import load_table

TABLE = """
[[grid]]
models = ["tiny-blip", "tiny-xvlm"]
methods = ["omp", "lamp", "snip"]
sparsities = [0.63, 0.9]
tasks = ["retrieval", "vqa"]
"""
SMALL = """
[[grid]]
models = ["tiny-blip"]
methods = [{methods}]
sparsities = [0.9]
tasks = ["retrieval"]
"""


def cells_of(tmp_path, text):
    path = tmp_path / "t.toml"
    path.write_text(text)
    return load_table(path, catalogue()).cells


def small(tmp_path, *methods):
    return cells_of(tmp_path, SMALL.format(methods=", ".join(f'"{m}"' for m in methods)))


def kinds(events):
    return {(event.kind, event.cell.config.pruning.method) for event in events}


def test_dense_rows_come_first_then_row_by_row(tmp_path):
    order = schedule(cells_of(tmp_path, TABLE))
    assert [cell.row[:2] for cell in order[:4]] == [("tiny-blip", "dense")] * 2 + [("tiny-xvlm", "dense")] * 2
    rows = [cell.row for cell in order]
    assert all(rows[i] == rows[i + 1] for i in range(0, len(rows), 2))


def test_workers_start_on_different_models_and_share_no_masks(tmp_path):
    pending = schedule(cells_of(tmp_path, TABLE))
    last = {0: None, 1: None}
    taken = {0: [], 1: []}
    for _ in range(len(pending) // 2):
        running = []
        for worker in (0, 1):
            cell = choose(pending, last[worker], running)
            pending.remove(cell)
            running.append(cell)
            taken[worker].append(cell)
            last[worker] = cell
    assert {cell.config.model for cell in taken[0]} == {"tiny-blip"}
    assert {cell.config.model for cell in taken[1]} == {"tiny-xvlm"}
    assert [cell.config.pruning.method for cell in taken[1][:2]] == ["dense", "dense"]


def test_every_cell_leaves_a_record_and_workers_use_one_thread(tmp_path):
    cells = cells_of(tmp_path, TABLE)
    events = list(execute(cells, fake_pipeline.run_noted, tmp_path, jobs=2))
    assert sum(event.kind == "finished" for event in events) == len(cells) == len(load_records(tmp_path))
    record = read_record(run_directory(tmp_path, cells[-1].key))
    assert record is not None
    assert (record.config, record.sparsity, record.contents) == (cells[-1].config, 0.9, cells[-1].contents)
    assert set(record.versions) == {"vlprune", "torch", "transformers"}
    notes = [line.split() for path in (tmp_path / "notes").iterdir() for line in path.read_text().splitlines()]
    assert len(notes) == len(cells)
    assert len({note[0] for note in notes}) == 2
    assert {note[1] for note in notes} == {"1"}
    assert workers() == []


def workers(pid=None):
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def test_what_another_sweep_finished_is_not_run_again(tmp_path):
    cells = small(tmp_path, "omp")
    list(execute(cells, fake_pipeline.run_noted, tmp_path, jobs=1))
    events = list(execute(cells, fake_pipeline.run_noted, tmp_path, jobs=1))
    assert [event.kind for event in events] == ["started", "finished"] * 2
    assert all(len(path.read_text().splitlines()) == 1 for path in (tmp_path / "notes").iterdir())


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    cells = small(tmp_path, "lamp", "snip", "omp")
    events = list(execute(cells, fake_pipeline.run_broken, tmp_path, jobs=1))
    assert {k for k in kinds(events) if k[0] != "started"} == {
        ("finished", "dense"),
        ("failed", "lamp"),
        ("failed", "snip"),
        ("warned", "omp"),
        ("finished", "omp"),
    }
    messages = {event.cell.config.pruning.method: event.message for event in events if event.message}
    assert messages["lamp"] == "RuntimeError: no luck"
    assert messages["snip"] == "ValueError: the run gave numbers that are not finite: {'tr_r1': nan}"
    assert messages["omp"] == "cache damaged"
    lamp = next(cell for cell in cells if cell.config.pruning.method == "lamp")
    text = (run_directory(tmp_path, lamp.key) / "error.txt").read_text()
    assert text.startswith("RuntimeError: no luck\n")
    assert 'raise RuntimeError("no\\nluck")' in text
    list(execute([lamp], fake_pipeline.run, tmp_path, jobs=1))
    assert not (run_directory(tmp_path, lamp.key) / "error.txt").exists()


def test_a_killed_worker_costs_its_cell_one_of_two_attempts(tmp_path):
    cells = small(tmp_path, "omp", "lamp", "snip")
    events = list(execute(cells, fake_pipeline.run_killed_once, tmp_path, jobs=2))
    assert {k for k in kinds(events) if k[0] != "started"} == {
        ("finished", "dense"),
        ("retried", "omp"),
        ("finished", "omp"),
        ("retried", "lamp"),
        ("failed", "lamp"),
        ("finished", "snip"),
    }
    message = next(event.message for event in events if event.kind == "failed")
    assert message == "the worker was killed by SIGKILL (out of memory?), 2 times; its output is in log.txt"
    lamp = next(cell for cell in cells if cell.config.pruning.method == "lamp")
    assert (run_directory(tmp_path, lamp.key) / "error.txt").read_text().startswith(message)


def test_each_worker_sees_one_device(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    list(execute(cells_of(tmp_path, TABLE), fake_pipeline.run_noted, tmp_path, jobs=2, devices=["2", "5"]))
    notes = [path.read_text().split() for path in seen(tmp_path)]
    assert sorted(device for _, device in {(note[0], note[2]) for note in notes}) == ["2", "5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,5"


def test_a_worker_that_follows_a_killed_one_takes_its_device(tmp_path):
    cells = small(tmp_path, "lamp", "omp")
    list(execute(cells, fake_pipeline.run_killed_once, tmp_path, jobs=1, devices=["7"]))
    lines = [line.split() for path in seen(tmp_path) for line in path.read_text().splitlines()]
    assert len({line[0] for line in lines}) > 1
    assert {line[2] for line in lines} == {"7"}


def seen(results):
    return list((results / "notes").iterdir())


@pytest.mark.parametrize(
    ("visible", "count", "found"), [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("", 0, []), (None, 0, [])]
)
def test_cuda_devices_are_those_visible(monkeypatch, visible, count, found):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert cuda_devices() == found


def test_closing_stops_the_workers(tmp_path):
    events = execute(small(tmp_path, "snip"), fake_pipeline.run_slow, tmp_path, jobs=2)
    for event in events:
        if event.kind == "started" and event.cell.config.pruning.method == "snip":
            break
    assert workers()
    events.close()
    assert workers() == []


SCRIPT = """
import signal
import sys
from pathlib import Path
import fake_pipeline
from vlprune.sweep.engine import execute
from vlprune.sweep.table import load_table

if __name__ == "__main__":
    # A job in the background starts with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(sys.argv[1])
    table = load_table(root / "t.toml", fake_pipeline.catalogue())
    for event in execute(table.cells, fake_pipeline.run_slow, root, jobs=2):
        pass
"""


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_the_parent_loses_only_the_running_cell(tmp_path, how):
    cells = small(tmp_path, "omp", "lamp", "snip")
    script = tmp_path / "sweep_script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: (tmp_path / "runs").exists() and len(load_records(tmp_path)) == 3)
        wait_for(lambda: any("snip" in path.name for path in (tmp_path / "notes").iterdir()))
        family = workers(parent.pid)
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)  # what a terminal does
        else:
            parent.send_signal(how)
        errors = parent.communicate(timeout=20)[1]
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))
    finally:
        parent.kill()
        parent.communicate()
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1  # the parent's; a worker says nothing
        assert parent.returncode != 0
    left = [cell for cell in cells if read_record(run_directory(tmp_path, cell.key)) is None]
    assert [cell.config.pruning.method for cell in left] == ["snip"]
    list(execute(left, fake_pipeline.run, tmp_path, jobs=2))
    assert len(load_records(tmp_path)) == len(cells)
