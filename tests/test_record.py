import errno
import json
import logging
import os
import platform

import pytest

from vlprune.config import PruningConfig, RunConfig
from vlprune.store.keys import Contents
from vlprune.store.record import Record, load_records, read_record, run_directory, write_error, write_record

PREDICTIONS = [{"image_id": 1, "caption": "a blå circle"}, {"image_id": 2, "caption": "b"}]


def record(key="abc", **changes):
    values = {
        "key": key,
        "config": RunConfig(pruning=PruningConfig("omp", 0.75)),
        "metrics": {"tr_r1": 50.0},
        "floors": {"chance": {"tr_r1": 0.3}},
        "sparsity": 0.75,
        "layer_sparsity": {"a": 0.75},
        "seconds": {"finetune": 1.5},
        "peak_memory": 123,
        "versions": {"torch": "2"},
        "contents": Contents("m", 1, "c", 1, 1, "t", 1),
    }
    return Record(**(values | changes))


def test_a_record_comes_back_as_it_was(tmp_path):
    directory = run_directory(tmp_path, "abc")
    write_error(directory, "RuntimeError: earlier")
    write_record(directory, record(), PREDICTIONS)
    assert read_record(directory) == record()
    assert load_records(tmp_path) == [record()]
    assert sorted(path.name for path in directory.iterdir()) == ["predictions.jsonl", "record.json"]
    lines = (directory / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == PREDICTIONS


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": {}}', '{"config": {"sed": 1}}'])
def test_a_damaged_record_counts_as_not_done(tmp_path, caplog, text):
    directory = run_directory(tmp_path, "abc")
    write_record(directory, record(), [])
    (directory / "record.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_record(directory) is None
    assert str(directory / "record.json") in caplog.text
    assert load_records(tmp_path) == []


def test_a_record_under_another_key_is_no_record(tmp_path, caplog):
    directory = run_directory(tmp_path, "abd")
    write_record(directory, record("abc"), [])
    assert read_record(directory) is None
    assert "record of run abc" in caplog.text


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = run_directory(tmp_path, "abc")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing: '.*predictions.jsonl'"):
        write_record(directory, record(), PREDICTIONS)
    assert list(directory.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    directory = run_directory(tmp_path, "abc")
    directory.mkdir(parents=True)
    host, kept = platform.node(), f".record.json.other-{platform.node()}.999999999.tmp"
    end = f"{host}.999999999.tmp"
    for name in (f".record.json.{end}", f"..record.json.{end}.{end}", kept, f".record.json.{host}.{os.getppid()}.tmp"):
        (directory / name).write_text("{")
    write_record(directory, record(), [])
    left = [f".record.json.{host}.{os.getppid()}.tmp", kept, "predictions.jsonl", "record.json"]
    assert sorted(path.name for path in directory.iterdir()) == sorted(left)


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not finite: \{'tr_r1': nan\}"):
        write_record(run_directory(tmp_path, "abc"), record(metrics={"tr_r1": float("nan"), "x": 1.0}), [])
    assert not run_directory(tmp_path, "abc").exists()


def test_a_missing_results_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results directory"):
        load_records(tmp_path / "none")
