import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_pipeline
import psutil
import pytest

from vlprune.execution import Execution
from vlprune.stages.fingerprints import Fingerprints
from vlprune.store.lease import claimed
from vlprune.store.record import load_records, read_record, run_directory
from vlprune.sweep.device import device_is_broken
from vlprune.sweep.engine import ELSEWHERE, execute
from vlprune.sweep.local import LocalPool
from vlprune.sweep.plan import schedule
from vlprune.sweep.planner import Planner, plan
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


def planned(tmp_path, text):
    path = tmp_path / "t.toml"
    path.write_text(text)
    return plan(load_table(path), Fingerprints())


def jobs_of(tmp_path, text):
    own = planned(tmp_path, text)
    return own.jobs(own.runs, tmp_path)


def small(tmp_path, *methods):
    return jobs_of(tmp_path, SMALL.format(methods=", ".join(f'"{m}"' for m in methods)))


def run(jobs, work, tmp_path, n_workers, devices=()):
    execution = Execution(store=tmp_path)
    return execute(jobs, LocalPool(work, execution, n_workers, devices), execution)


def kinds(events):
    return {(event.kind, event.job.configs[0].pruning.method) for event in events}


def method_of(job):
    return job.configs[0].pruning.method


def test_dense_rows_come_first_then_row_by_row(tmp_path):
    order = [run.cell for run in schedule(planned(tmp_path, TABLE).runs)]
    assert [cell.row[:2] for cell in order[:4]] == [("tiny-blip", "dense")] * 2 + [("tiny-xvlm", "dense")] * 2
    rows = [cell.row for cell in order]
    assert all(rows[i] == rows[i + 1] for i in range(0, len(rows), 2))


def test_a_plan_has_every_shared_stage_once_before_its_readers(tmp_path):
    jobs = jobs_of(tmp_path, TABLE)
    assert [job.kind for job in jobs].count("record") == 2 * (1 + 3 * 2) * 2
    assert [str(job) for job in jobs if job.kind == "statistics"] == [
        "tiny-blip statistics seed 0",
        "tiny-xvlm statistics seed 0",
    ]
    assert [str(job) for job in jobs if job.kind == "masks"] == [
        f"{model} {method} masks at 63, 90 % seed 0"
        for model in ("tiny-blip", "tiny-xvlm")
        for method in ("omp", "lamp", "snip")
    ]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for i, job in enumerate(jobs):
        assert set(job.after) <= set(names[:i])
    snip = [job for job in jobs if method_of(job) == "snip" and job.is_run]
    assert all(len(job.after) == 2 for job in snip)


def test_what_one_run_reads_alone_is_part_of_its_job(tmp_path):
    jobs = small(tmp_path, "snip", "omp")
    assert [job.kind for job in jobs] == ["record"] * 3


def test_every_cell_leaves_a_record_and_workers_use_one_thread(tmp_path):
    jobs = jobs_of(tmp_path, TABLE)
    events = list(run(jobs, fake_pipeline.work_noted, tmp_path, 2))
    assert sum(event.kind == "finished" for event in events) == len(jobs)
    assert len(load_records(tmp_path)) == sum(job.is_run for job in jobs)
    record = read_record(run_directory(tmp_path, jobs[-1].keys[0]))
    assert record is not None
    assert (record.config, record.sparsity) == (jobs[-1].configs[0], 0.9)
    notes = [line.split() for path in (tmp_path / "notes").iterdir() for line in path.read_text().splitlines()]
    assert len(notes) == len(jobs)
    assert len({note[0] for note in notes}) == 2
    assert {note[1] for note in notes} == {"1"}
    assert workers() == []


def workers(pid=None):
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    jobs = small(tmp_path, "lamp", "snip", "omp")
    events = list(run(jobs, fake_pipeline.work_broken, tmp_path, 1))
    assert {k for k in kinds(events) if k[0] != "started"} == {
        ("finished", "dense"),
        ("failed", "lamp"),
        ("failed", "snip"),
        ("warned", "omp"),
        ("finished", "omp"),
    }
    messages = {method_of(event.job): event.message for event in events if event.message}
    assert messages["lamp"] == "RuntimeError: no luck"
    assert messages["snip"] == "ValueError: the run gave numbers that are not finite: {'tr_r1': nan}"
    assert messages["omp"] == "cache damaged"
    lamp = next(job for job in jobs if method_of(job) == "lamp")
    text = (run_directory(tmp_path, lamp.name) / "error.txt").read_text()
    assert text.startswith("RuntimeError: no luck\n")
    assert 'raise RuntimeError("no\\nluck")' in text
    list(run([lamp], fake_pipeline.work, tmp_path, 1))
    assert not (run_directory(tmp_path, lamp.name) / "error.txt").exists()


# OMP's worker is of no use after the first attempt, LAMP's after every one.
ONE_RETRIED_ONE_LOST = {
    ("finished", "dense"),
    ("retried", "omp"),
    ("finished", "omp"),
    ("retried", "lamp"),
    ("failed", "lamp"),
    ("finished", "snip"),
}


def test_a_killed_worker_costs_its_cell_one_of_two_attempts(tmp_path):
    jobs = small(tmp_path, "omp", "lamp", "snip")
    events = list(run(jobs, fake_pipeline.work_killed_once, tmp_path, 2))
    assert {k for k in kinds(events) if k[0] != "started"} == ONE_RETRIED_ONE_LOST
    message = next(event.message for event in events if event.kind == "failed")
    assert message == "the worker was killed by SIGKILL (out of memory?), 2 times; its output is in log.txt"
    lamp = next(job for job in jobs if method_of(job) == "lamp")
    assert (run_directory(tmp_path, lamp.name) / "error.txt").read_text().startswith(message)


def test_an_error_of_the_device_ends_the_worker_and_not_the_sweep(tmp_path):
    jobs = small(tmp_path, "omp", "lamp", "snip")
    events = list(run(jobs, fake_pipeline.work_with_a_broken_device, tmp_path, 1))
    assert {k for k in kinds(events) if k[0] != "started"} == ONE_RETRIED_ONE_LOST
    message = next(event.message for event in events if event.kind == "failed")
    assert message.startswith("AcceleratorError: CUDA error: device-side assert triggered, 2 times; ")
    [lamp] = (path for path in seen(tmp_path) if "lamp" in path.name)
    first, second = (line.split()[0] for line in lamp.read_text().splitlines())
    assert first != second
    [log] = (tmp_path / job.log for job in jobs if method_of(job) == "lamp")
    assert "work_with_a_broken_device" in log.read_text()


@pytest.mark.parametrize(("later", "broken"), [(None, False), (RuntimeError("CUDA error: an illegal address"), True)])
def test_an_error_under_another_name_is_of_the_device_where_later_calls_fail(monkeypatch, later, broken):
    import torch

    def synchronize():
        if later:
            raise later

    assert not device_is_broken(RuntimeError("no device was used"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert device_is_broken(RuntimeError("cuDNN error")) == broken


def test_what_another_sweep_works_on_is_done_last_and_taken_from_it(tmp_path):
    jobs = small(tmp_path, "omp", "lamp")
    omp = next(job for job in jobs if method_of(job) == "omp")
    events = []
    with claimed([tmp_path / omp.files[0]]):
        for event in run(jobs, fake_pipeline.work_noted, tmp_path, 1):
            events.append((event.kind, method_of(event.job), event.message))
            if event.kind == "finished" and method_of(event.job) == "lamp":
                fake_pipeline.work(omp, Execution(store=tmp_path), lambda: False)  # the other one's
    assert [kind for kind, method, _ in events if method == "omp"] == ["waiting", "finished"]
    assert events[-1] == ("finished", "omp", ELSEWHERE)
    assert f"process {os.getpid()} on " in next(message for kind, _, message in events if kind == "waiting")
    assert not any("omp" in path.name for path in (tmp_path / "notes").iterdir())


def test_what_another_sweep_gave_up_is_done_here(tmp_path):
    jobs = small(tmp_path, "omp")
    omp = next(job for job in jobs if method_of(job) == "omp")
    kinds_of_omp = []
    claim = claimed([tmp_path / omp.files[0]])
    claim.__enter__()
    for event in run(jobs, fake_pipeline.work, tmp_path, 1):
        if method_of(event.job) == "omp":
            kinds_of_omp.append(event.kind)
            if event.kind == "waiting":
                claim.__exit__(None, None, None)
    assert kinds_of_omp == ["waiting", "started", "finished"]


def test_each_worker_sees_one_device(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    list(run(jobs_of(tmp_path, TABLE), fake_pipeline.work_noted, tmp_path, 2, ["2", "5"]))
    notes = [path.read_text().split() for path in seen(tmp_path)]
    assert sorted(device for _, device in {(note[0], note[2]) for note in notes}) == ["2", "5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,5"


def test_a_worker_that_follows_a_killed_one_takes_its_device(tmp_path):
    jobs = small(tmp_path, "lamp", "omp")
    list(run(jobs, fake_pipeline.work_killed_once, tmp_path, 1, ["7"]))
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
    assert Planner().devices() == found


def test_closing_stops_the_workers(tmp_path):
    events = run(small(tmp_path, "snip"), fake_pipeline.work_slowly, tmp_path, 2)
    for event in events:
        if event.kind == "started" and method_of(event.job) == "snip":
            break
    assert workers()
    events.close()
    assert workers() == []


SCRIPT = """
import signal
import sys
from pathlib import Path
import fake_pipeline
from vlprune.execution import Execution
from vlprune.sweep.engine import execute
from vlprune.sweep.local import LocalPool

if __name__ == "__main__":
    from vlprune.stages.fingerprints import Fingerprints
    from vlprune.sweep.planner import plan
    from vlprune.sweep.table import load_table

    # A job in the background starts with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(sys.argv[1])
    own = plan(load_table(root / "t.toml"), Fingerprints())
    work = getattr(fake_pipeline, sys.argv[2])
    execution = Execution(store=root)
    for event in execute(own.jobs(own.runs, root), LocalPool(work, execution, 2), execution):
        pass
"""


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("work", ["work_slowly", "work_until_asked"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_the_parent_loses_only_the_running_cell(tmp_path, how, work):
    jobs = small(tmp_path, "omp", "lamp", "snip")
    script = tmp_path / "sweep_script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), work],
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
        errors = parent.communicate(timeout=60)[1]
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))
    finally:
        parent.kill()
        parent.communicate()
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1  # the parent's; a worker says nothing
        assert parent.returncode != 0
    left = [job for job in jobs if read_record(run_directory(tmp_path, job.name)) is None]
    assert [method_of(job) for job in left] == ["snip"]
    assert (tmp_path / "notes" / "stored").exists() == (work == "work_until_asked")
    list(run(left, fake_pipeline.work, tmp_path, 2))
    assert len(load_records(tmp_path)) == len(jobs)
