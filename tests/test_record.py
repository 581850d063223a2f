import errno
import json
import logging
import os
from dataclasses import replace

import pytest

from vlprune.config import PruningConfig, RunConfig
from vlprune.store.artifacts import Note, written
from vlprune.store.atomic import atomic, write_text
from vlprune.store.manifest import Manifest, Place, read_manifest, write_manifest
from vlprune.store.place import place
from vlprune.store.record import RECORD, Record, load_records, read_record, record_text, run_directory


def record(key="abc", **changes):
    values = {
        "key": key,
        "config": RunConfig(pruning=PruningConfig("omp", 0.75)),
        "metrics": {"tr_r1": 50.0},
        "floors": {"chance": {"tr_r1": 0.3}},
        "sparsity": 0.75,
        "modality_sparsity": {"text": 0.75},
        "layers": {"a": {"modality": "text", "weights": 8, "zeros": 6}},
        "seconds": {"tuned": 1.5},
        "peak_memory": 123,
        "left_out": {},
        "origins": {"record": {"host": "vm", "versions": {"torch": "2"}}},
        "stages": {"masks": "m", "tuned": "t", "predictions": "p", "settings": "s"},
    }
    return Record(**(values | changes))


def write(directory, own):
    with written(directory / RECORD, Note()) as half:
        half.write_text(record_text(own))


def test_a_record_comes_back_as_it_was(tmp_path):
    directory = run_directory(tmp_path, "abc")
    write(directory, record())
    assert read_record(directory) == record()
    assert load_records(tmp_path) == [record()]
    assert sorted(path.name for path in directory.iterdir()) == ["record.json", "record.json.note"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": {}}', '{"config": {"sed": 1}}'])
def test_a_damaged_record_counts_as_not_done(tmp_path, caplog, text):
    directory = run_directory(tmp_path, "abc")
    write(directory, record())
    for note in (True, False):
        if note:
            (directory / RECORD).write_text(text)
        else:
            with written(directory / RECORD, Note()) as half:
                half.write_text(text)
        with caplog.at_level(logging.WARNING):
            assert read_record(directory) is None
        assert str(directory / RECORD) in caplog.text
        assert load_records(tmp_path) == []


def test_no_flipped_bit_of_a_record_is_accepted(tmp_path):
    directory = run_directory(tmp_path, "abc")
    write(directory, record())
    whole = (directory / RECORD).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (directory / RECORD).write_bytes(flipped)
        assert read_record(directory) is None
    (directory / RECORD).write_bytes(whole)
    assert read_record(directory) == record()


def test_a_record_under_another_key_is_no_record(tmp_path, caplog):
    directory = run_directory(tmp_path, "abd")
    write(directory, record("abc"))
    assert read_record(directory) is None
    assert "record of run abc" in caplog.text


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = run_directory(tmp_path, "abc")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing: '.*record.json"):
        write(directory, record())
    assert list(directory.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    directory = tmp_path / "abc"
    directory.mkdir(parents=True)
    here, there = place(), "0" * 12
    assert here
    dead, random = "999999999", "0123abcd"
    removed = [f".x.json.{here}.{dead}.{random}.tmp", f"..x.json.{here}.{dead}.{random}.tmp.{here}.1.{random}.tmp"]
    removed[1] = removed[1].replace(f"{here}.1.", f"{here}.{dead}.")
    old = f".y.json.{there}.1.{random}.tmp"  # of another place, where nobody can be asked whether he lives
    kept = [f".x.json.{there}.{dead}.{random}.tmp", f".x.json.{here}.{os.getppid()}.{random}.tmp", ".x.json.tmp"]
    for name in (*removed, old, *kept):
        (directory / name).write_text("{")
    os.utime(directory / old, (1e9, 1e9))
    write_text(directory / "x.json", "{}")
    assert sorted(path.name for path in directory.iterdir()) == sorted([*kept, "x.json"])


def test_two_writers_of_one_file_leave_one_of_the_two(tmp_path):
    with atomic(tmp_path / "x") as one, atomic(tmp_path / "x") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "x").read_text() == "one"  # the last to end
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_metric_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"not finite: \{'tr_r1': nan\}"):
        record_text(record(metrics={"tr_r1": float("nan"), "x": 1.0}))


def test_a_missing_results_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results directory"):
        load_records(tmp_path / "none")


def test_a_manifest_comes_back_as_it_was(tmp_path):
    cells = (Place("m", "omp", "", 0.75, "vqa", 0, "abc"), Place("m", "dense", "lr=0.1", 0.0, "vqa", 0, "abd"))
    manifest = Manifest("t", {"vqa": "accuracy"}, {"chita": {"lam": "0.01"}}, cells)
    path = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path, "t") == manifest
    assert manifest.variants == {"abc": "", "abd": "lr=0.1"}
    with pytest.raises(ValueError, match=r"no sweep of table 'x' in .* There are: t$"):
        read_manifest(tmp_path, "x")
    whole = json.loads(path.read_text())
    cell = whole["cells"][0]
    wrong = [{"headlines": {}}, {"headlines": None}, {"defaults": {"omp": "x"}}, {"name": 5}, {"cells": [cell] * 2}]
    wrong += [{"cells": [{**cell, name: None}]} for name in cell]
    wrong += [{"cells": [{**cell, **change}]} for change in ({"sparsity": "x"}, {"sparsity": 1.5}, {"key": 3})]
    texts = ["", "[]", "{}", json.dumps({"cells": [1]}), *(json.dumps({**whole, **change}) for change in wrong)]
    for text in texts:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"t\.json is no manifest"):
            read_manifest(tmp_path, "t")


def test_a_manifest_holds_equal_parts_of_its_records_once_and_says_what_they_say(tmp_path):
    numbers = {"a": 50.0, "b": 50, "c": True}
    stored = {key: record(key, metrics=numbers) for key in ("one", "other")}
    for key, own in stored.items():
        write(run_directory(tmp_path, key), own)
    places = [Place("named", "omp", "", 0.75, "retrieval", seed, key) for seed, key in enumerate(stored)]
    one, other = Manifest("t", {"retrieval": "tr_r1"}, {}, tuple(places)).records(tmp_path)
    assert one.origins is other.origins
    assert one.config.task is other.config.task
    named = replace(stored["other"].config, model=replace(stored["other"].config.model, name="named"))
    assert other == replace(stored["other"], config=named, layers={})
    assert list(map(type, other.metrics.values())) == [float, int, bool]
