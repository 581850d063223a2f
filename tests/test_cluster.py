"""A sweep on a Ray cluster of three machines, of which one is killed, and the sweep itself."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import apart
import psutil
import pytest
from apart import MACHINE
from conftest import small_model

from vlprune.models import save_model

pytest.importorskip("ray", reason="Ray is an extra: pip install 'vlprune[ray]'")

TABLE = """
[base.calibration]
n_batches = 2
batch_size = 4
[base.finetuning]
steps = 3
batch_size = 4
[[grid]]
models = ["{model}"]
methods = ["multiflow", "omp"]
sparsities = [0.5, 0.75]
tasks = ["retrieval", "vqa"]
"""
WAIT = 300.0  # seconds, for machines that are busy


def start(*command: object, log: Path, **environment: str) -> subprocess.Popen:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**own, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment},
            start_new_session=True,
        )


def end(process: subprocess.Popen) -> None:
    """Kills a process and all that it started."""
    family = []
    with suppress(psutil.NoSuchProcess):  # also of one that has ended and is not waited for yet
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def wait_for(condition, what: str, log: Path) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen: {log.read_text()[-2000:]}"
        time.sleep(0.1)


@pytest.fixture
def cluster():
    """(address, a function that starts a machine of one core, given variables) of a cluster whose head does no work."""
    # Sockets of the cluster have long names, and paths of sockets are short.
    root = Path(tempfile.mkdtemp(prefix="vlp", dir="/tmp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray, address, machines = [sys.executable, "-m", "ray.scripts.scripts", "start"], f"127.0.0.1:{port}", []
    small = ["--object-store-memory", 80_000_000, "--disable-usage-stats", "--block"]

    def machine(**environment: str) -> subprocess.Popen:
        log = root / f"machine{len(machines)}.log"
        machines.append(start(*ray, "--address", address, "--num-cpus", 1, *small, log=log, **environment))
        # One after the other: machines that share a host choose their ports without looking at each other.
        wait_for(lambda: "Ray runtime started" in log.read_text(), "the start of a machine", log)
        return machines[-1]

    head = ["--head", "--port", port, "--num-cpus", 0, "--include-dashboard", "false", "--temp-dir", root / "ray"]
    machines.append(start(*ray, *head, *small, log=root / "head.log"))

    def is_up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(is_up, "the start of the head", root / "head.log")
    try:
        yield address, machine
    finally:
        for each in machines:
            end(each)
        shutil.rmtree(root, ignore_errors=True)


def done(results: Path) -> dict[str, int]:
    """{key of a finished run: when it was stored}."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (results / "runs").glob("*/record.json")}


def numbers(results: Path) -> dict[str, tuple]:
    records = [json.loads(path.read_text()) for path in (results / "runs").glob("*/record.json")]
    return {record["key"]: (record["metrics"], record["layers"]) for record in records}


def test_a_cluster_that_loses_a_machine_and_its_sweep_gives_the_table_of_one_machine(cluster, dataset, tmp_path):
    address, machine = cluster
    save_model(small_model("xvlm"), tmp_path / "model")
    table = tmp_path / "small.toml"
    table.write_text(TABLE.format(model=tmp_path / "model"))
    results, log = tmp_path / "shared", tmp_path / "sweep.log"
    command = [sys.executable, "-m", "vlprune.sweep", table, "--data", dataset]
    far = [*command, "--results", results, "--engine", "ray", "--address", address, "--jobs", 2]

    lost, _ = machine(), machine()
    driver = start(*far, log=log)
    wait_for(lambda: len(done(results)) >= 2, "two runs", log)
    end(lost)
    wait_for(lambda: len(done(results)) >= 4, "two more runs without the machine", log)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    end(driver)
    kept = done(results)
    assert len(kept) < 10

    again = start(*far, log=log)
    assert again.wait(WAIT) == 0, log.read_text()
    assert "10 runs" in log.read_text()
    assert kept.items() <= done(results).items()

    here = start(*command, "--results", tmp_path / "local", "--jobs", 2, log=log)
    assert here.wait(WAIT) == 0, log.read_text()
    assert numbers(results) == numbers(tmp_path / "local")
    tables = [root / "tables" / "small.csv" for root in (results, tmp_path / "local")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert not [*results.rglob("*.tmp"), *results.rglob("*.lease")]


def test_a_cluster_without_machines_is_waited_for_with_a_word(cluster, dataset, tmp_path):
    address, machine = cluster
    save_model(small_model("xvlm"), tmp_path / "model")
    table = tmp_path / "small.toml"
    table.write_text(TABLE.format(model=tmp_path / "model"))
    results, log = tmp_path / "results", tmp_path / "sweep.log"
    command = [sys.executable, "-m", "vlprune.sweep", table, "--data", dataset, "--methods", "omp", "--tasks", "vqa"]
    first = machine()
    sweep = start(*command, "--results", results, "--engine", "ray", "--address", address, log=log)
    try:
        wait_for(lambda: done(results), "a run", log)
        end(first)
        wait_for(lambda: "no machine of the cluster is left" in log.read_text(), "a word", log)
        machine()
        assert sweep.wait(WAIT) == 0, log.read_text()
    finally:
        end(sweep)
    assert len(done(results)) == 3


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, dataset):
    save_model(small_model("xvlm"), tmp_path / "model")
    table = tmp_path / "small.toml"
    table.write_text(TABLE.format(model=tmp_path / "model"))
    log = tmp_path / "log"
    options = ["--data", dataset, "--results", tmp_path / "results", "--engine", "ray", "--address", "127.0.0.1:1"]
    process = start(sys.executable, "-m", "vlprune.sweep", table, *options, log=log)
    assert process.wait(WAIT) == 2
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "no Ray cluster at '127.0.0.1:1'" in line


def test_machines_that_share_a_remote_alone_give_the_table_of_one_machine(cluster, dataset, tmp_path):
    """One is killed; what it had made is taken from the remote, which is a directory that no sweep works in."""
    address, machine = cluster
    save_model(small_model("xvlm"), tmp_path / "model")
    table = tmp_path / "small.toml"
    table.write_text(TABLE.format(model=tmp_path / "model").replace('"retrieval", "vqa"', '"vqa"'))
    remote, mirror, log = tmp_path / "remote", tmp_path / "mirror", tmp_path / "sweep.log"
    sweep = [table, "--data", dataset, "--results"]
    far = [mirror, "--engine", "ray", "--address", address, "--remote", f"file://{remote}"]
    lost, _ = (machine(**{MACHINE: str(tmp_path / name)}) for name in ("one", "two"))
    driver = start(sys.executable, apart.__file__, *sweep, *far, log=log)
    try:
        wait_for(lambda: done(tmp_path / "one"), "a run of the machine that is lost", log)
        end(lost)
        assert driver.wait(WAIT) == 0, log.read_text()
    finally:
        end(driver)
    here = start(sys.executable, "-m", "vlprune.sweep", *sweep, tmp_path / "local", "--jobs", 2, log=log)
    assert here.wait(WAIT) == 0, log.read_text()
    assert numbers(mirror) == numbers(remote) == numbers(tmp_path / "local")
    tables = [root / "tables" / "small.csv" for root in (mirror, remote, tmp_path / "local")]
    assert len({path.read_bytes() for path in tables}) == 1
    assert all(done(tmp_path / name) for name in ("one", "two"))
    assert not list(mirror.glob("predictions/*"))
    for root in (remote, tmp_path / "two", mirror):
        assert not list(root.glob("cache/tuned/*.safetensors"))
