"""Sweeps of machines that share an object store and nothing else."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_pipeline
import pytest
from conftest import small_model, write_dataset
from rich.console import Console
from test_end_to_end import numbers

from vlprune.models import save_model
from vlprune.reports.frame import RESULTS
from vlprune.sweep.command import sweep
from vlprune.sweep.local import local_pool
from vlprune.sweep.options import Options
from vlprune.sweep.planner import Planner

TABLE = """
[base.calibration]
n_batches = 2
batch_size = 4
[base.finetuning]
steps = {steps}
batch_size = 4
[[grid]]
models = ["{model}"]
methods = ["multiflow", "omp"]
sparsities = [0.75]
tasks = ["retrieval", "vqa"]
"""
FAKE = """
[[grid]]
models = ["tiny-blip"]
methods = ["omp", "lamp"]
sparsities = [0.9]
tasks = ["retrieval"]
"""
BUCKET = "s3://bucket/x"


@pytest.fixture(scope="module")
def s3():
    """The environment of processes that use a server of S3 which has one bucket, and the client of a test."""
    pytest.importorskip("moto", reason="moto stands for S3: pip install 'moto[server]'")
    boto3 = pytest.importorskip("boto3", reason="moto comes with boto3")
    pytest.importorskip("s3fs", reason="s3fs is an extra: pip install 'vlprune[s3]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < until
        time.sleep(0.1)
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="any", aws_secret_access_key="any", region_name="us-east-1"
    )
    client.create_bucket(Bucket="bucket")
    try:
        yield SimpleNamespace(environment={"AWS_ENDPOINT_URL": url, **keys}, client=client)
    finally:
        client.close()
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a table, its model and its data."""
    root = tmp_path_factory.mktemp("work")
    save_model(small_model("xvlm"), root / "model")
    (root / "small.toml").write_text(TABLE.format(model=root / "model", steps=3))
    write_dataset(root / "data")
    return root


def arguments(work, results, *more):
    words = [work / "small.toml", "--data", work / "data", "--results", results, "--jobs", 2, *more]
    return list(map(str, words))


def start(s3, work, results, *more, module=("-m", "vlprune.sweep"), **environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.Popen(
        [sys.executable, *module, *arguments(work, results, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**own, "OMP_NUM_THREADS": "1", **s3.environment, **environment},
        start_new_session=True,
    )


def swept(s3, work, results, *more, code=0, **options):
    process = start(s3, work, results, *more, **options)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    assert "Traceback" not in text
    return text


def listed(s3, bucket="bucket"):
    """The names of all objects."""
    return [each["Key"] for each in s3.client.list_objects_v2(Bucket=bucket).get("Contents", [])]


def stored(s3, bucket="bucket"):
    """{name: content} of all objects; no sweep may delete one meanwhile."""
    return {name: s3.client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in listed(s3, bucket)}


@pytest.fixture(scope="module")
def first(s3, work, tmp_path_factory):
    """The mirror of a first machine, whose sweep is over, and what it printed."""
    results = tmp_path_factory.mktemp("first")
    return SimpleNamespace(results=results, text=swept(s3, work, results, "--remote", BUCKET))


def tables(results):
    """{name: content} of the tables but for their rows, which say when each run was made."""
    paths = sorted((results / "tables").iterdir())
    return {p.name: p.read_bytes() for p in paths if p.suffix in (".csv", ".md") and not p.name.endswith(RESULTS)}


def test_a_machine_with_an_empty_mirror_prints_the_same_table_and_runs_nothing(s3, work, first, tmp_path):
    assert "6 runs finished, 0 failed" in first.text
    text = swept(s3, work, tmp_path / "second", "--remote", BUCKET)
    assert "small: 6 runs, 6 done" in text
    assert "finished" not in text
    assert tables(tmp_path / "second") == tables(first.results)
    assert "small_overlap.csv" in tables(first.results)
    assert numbers(tmp_path / "second") == numbers(first.results)
    again = swept(s3, work, tmp_path / "second", "--remote", BUCKET)
    assert again.split("R mean")[1:] == text.split("R mean")[1:]
    for more in ((), ("--remote", BUCKET)):
        assert "are as they were stored" in swept(
            s3, work, tmp_path / "second", "--verify", *more, code=0 if more else 1
        )
    report = [sys.executable, "-m", "vlprune.report", "small", "--results", str(tmp_path / "second")]
    done = subprocess.run(report, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "multiflow" in done.stdout


def test_the_remote_is_a_results_directory_without_weights_and_checkpoints(s3, first):
    names = {Path(name).relative_to("x") for name in listed(s3)}
    here = {path.relative_to(first.results) for path in first.results.rglob("*") if path.is_file()}
    assert {path for path in here - names if path.parts[:2] != ("cache", "plans")} == set()
    assert names - here == set()
    assert not [path for path in names if path.suffix in (".checkpoint", ".lease", ".tmp", ".parts")]
    assert not [path for path in names if path.parts[:2] == ("cache", "tuned") and path.suffix == ".safetensors"]
    for name in ("log.txt", "losses.csv", "record.json", "record.json.note"):
        assert sum(path.name == name for path in names) == 6
    assert Path("manifests/small.json") in names
    assert Path("tables/small.md") in names


def test_weights_that_are_kept_are_at_the_remote_and_evaluated_again_by_another_machine(s3, work, tmp_path):
    options = ("--remote", f"file://{tmp_path}/root", "--methods", "dense", "--tasks", "retrieval")
    swept(s3, work, tmp_path / "a", *options, "--keep-weights", "all")
    text = swept(s3, work, tmp_path / "b", *options, "--keep-weights", "all", "--set", "task.options.k_test=12")
    assert "1 runs finished, 0 failed" in text
    [log] = (tmp_path / "b").glob("runs/*/log.txt")
    assert "fine-tuning begins" not in log.read_text()
    found = {root: len(list((tmp_path / root).glob("cache/tuned/*.safetensors"))) for root in ("root", "a", "b")}
    assert found == {"root": 1, "a": 0, "b": 0}
    assert len(list((tmp_path / "b").glob("runs/*/losses.csv"))) == 1


def test_why_runs_failed_is_known_on_every_machine(tmp_path):
    table = tmp_path / "t.toml"
    table.write_text(FAKE)

    def go(name, **more):
        options = Options(table=table, results=tmp_path / name, remote=f"file://{tmp_path}/root", jobs=2, **more)
        console = Console(file=io.StringIO(), width=200)
        code = sweep(options, Planner(), partial(local_pool, fake_pipeline.work_broken), console)
        return code, console.file.getvalue()

    assert go("a")[0] == 1
    code, text = go("b", status=True)
    assert code == 0
    assert "t: 3 runs, 2 done, 0 running, 1 failed, 0 to run" in text
    assert "RuntimeError: no luck" in text
    code, text = go("c", dry_run=True, retry_failed=True)
    assert "to run  tiny-blip lamp@90%" in text
    assert "3 runs, 2 done" in text
    assert (tmp_path / "root" / "tables" / "t.md").is_file()
    [log] = {path.parent for path in tmp_path.glob("root/runs/*/error.txt")}
    assert "no\nluck" in (log / "log.txt").read_text()


def wait_for(condition, process, seconds=200.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)


def test_a_sweep_whose_machine_is_lost_goes_on_on_another_from_what_is_at_the_remote(s3, work, first, tmp_path):
    """It is killed after a run; then some of what it left is damaged, or there in part."""
    s3.client.create_bucket(Bucket="lost")
    lost, remote = tmp_path / "lost", ("--remote", "s3://lost/x/")
    process = start(s3, work, lost, *remote)

    def there(place, end):
        return [name for name in listed(s3, "lost") if name.startswith(f"x/{place}/") and name.endswith(end)]

    wait_for(lambda: there("runs", "record.json.note") and there("cache/masks", ".note"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(lost)
    before = stored(s3, "lost")
    statistic, masks = (there(f"cache/{kind}", ".safetensors")[0] for kind in ("statistics", "masks"))
    [done, *_] = there("runs", "record.json")
    s3.client.delete_object(Bucket="lost", Key=f"{statistic}.note")
    s3.client.put_object(Bucket="lost", Key=masks, Body=before[masks][:-1])
    s3.client.put_object(Bucket="lost", Key=done, Body=before[done].replace(b"1", b"2"))

    text = swept(s3, work, tmp_path / "other", *remote)
    assert "runs finished, 0 failed" in text
    assert f"{done.removeprefix('x/')} is damaged in s3://lost/x" in text
    assert numbers(tmp_path / "other") == numbers(first.results)
    assert tables(tmp_path / "other") == tables(first.results)
    after = stored(s3, "lost")
    for name in (masks, done):
        assert after[f"{name}.note"] != before[f"{name}.note"]
    kept = [name for name in before if name.endswith(".safetensors.note") and name[:-5] not in (statistic, masks)]
    assert [name for name in kept if "/tuned/" not in name and after[name] != before[name]] == []


def test_a_remote_that_fails_stops_a_sweep_and_gets_later_what_was_made_meanwhile(s3, work, tmp_path):
    root, away, results = tmp_path / "root", tmp_path / "away", tmp_path / "results"
    options = ("--remote", f"file://{root}", "--tasks", "vqa", "--methods", "omp")
    process = start(s3, work, results, *options)
    wait_for(lambda: list(root.glob("cache/tuned/*.losses.csv")), process)
    root.rename(away)
    made = [path.name.partition(".")[0] for path in away.glob("cache/tuned/*.losses.csv")]
    assert made
    root.touch()  # where no directory can be made
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 3, text
    assert "Traceback" not in text
    # A worker or the sweep itself meets it first.
    assert re.search(rf"^stopped: (RemoteError: )?remote {re.escape(f'file://{root}')}: ", text, re.MULTILINE), text
    # What was made is kept: weights, or the predictions made with them, after which weights are deleted.
    assert [*results.glob("cache/tuned/*.safetensors"), *results.glob("predictions/*.jsonl")]

    root.unlink()
    away.rename(root)
    assert "0 failed" in swept(s3, work, results, *options)
    found = numbers(root)
    assert len(found) == 2
    assert found == numbers(results)
    runs = {json.loads(path.read_text())["stages"]["tuned"]: path.parent for path in results.glob("runs/*/record.json")}
    for key in made:  # another may have been stopped while it was trained
        assert (runs[key] / "log.txt").read_text().count("fine-tuning begins") == 1
    assert not [path for path in (*root.rglob("*"), *results.rglob("*")) if path.suffix in (".checkpoint", ".lease")]
    assert not list(root.glob("cache/tuned/*.safetensors"))


WITHOUT_S3FS = """
import sys
sys.modules["s3fs"] = None
from vlprune.sweep.__main__ import main
main()
"""
REFUSED = {
    "no bucket": ("s3://none/x", {}, "The specified bucket does not exist"),
    "nobody there": (BUCKET, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "Could not connect to the endpoint URL"),
    "no credentials": (
        BUCKET,
        {"AWS_ACCESS_KEY_ID": "", "AWS_SHARED_CREDENTIALS_FILE": "/none", "AWS_EC2_METADATA_DISABLED": "true"},
        "Unable to locate credentials",
    ),
    "no package": (BUCKET, {}, "Install s3fs to access S3: pip install 'vlprune[s3]'"),
    "no such protocol": ("s4://bucket/x", {}, "Protocol not known: s4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_remote_that_cannot_be_used_is_one_line_before_anything_runs(s3, work, tmp_path, what):
    url, environment, reason = REFUSED[what]
    module = ("-c", WITHOUT_S3FS) if what == "no package" else ("-m", "vlprune.sweep")
    options = {"module": module, "code": 2, **environment}
    text = swept(s3, work, tmp_path / "results", "--remote", url, **options)
    [line] = text.splitlines()
    assert line.startswith(f"error: remote {url}: {reason}")
    assert not (tmp_path / "results").exists()
