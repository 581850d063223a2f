import errno
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from vlprune.execution import Execution
from vlprune.stages.stage import Bench, Made, Stage, obtain
from vlprune.store import artifacts
from vlprune.store.artifacts import intact, read_note
from vlprune.store.parts import Parts


def stage(make=None, **changes):
    """A stage whose artifact is a text."""
    values = {
        "kind": "text",
        "reads": {"a": 1},
        "make": make or (lambda stages, inputs, bench: [Made("content", {"length": 7}) for _ in stages]),
        "file": lambda results, key: results / "deep" / f"{key}.txt",
        "save": lambda made, path: path.write_text(made.value) and None,
        "load": lambda path, bench: path.read_text(),
    }
    return Stage(**(values | changes))


def never(*_):
    raise AssertionError("made again")


def get(results, own):
    [value] = obtain([own], Bench(Execution(store=results)))
    return value


def test_an_artifact_is_made_once_and_read_then(tmp_path):
    assert get(tmp_path, stage()) == "content"
    assert get(tmp_path, stage(never)) == "content"
    note = read_note(stage().path(tmp_path))
    assert note is not None
    assert note.facts == {"length": 7}
    assert note.made_of["a"] == 1
    assert note.costs["text"][1] > 0


@pytest.mark.parametrize("damage", ["conten", "c0ntent", "content!", ""])
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path, caplog, damage):
    get(tmp_path, stage())
    path = stage().path(tmp_path)
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert get(tmp_path, stage()) == "content"
    assert f"{path} is damaged" in caplog.text
    assert get(tmp_path, stage(never)) == "content"


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{}", b'{"sha256": "0"}', b"[]"])
def test_an_artifact_with_a_damaged_note_is_made_again(tmp_path, damage):
    get(tmp_path, stage())
    artifacts.note_path(stage().path(tmp_path)).write_bytes(damage)
    assert not intact(stage().path(tmp_path))
    assert get(tmp_path, stage()) == "content"


def test_an_artifact_that_another_process_deletes_before_it_is_read_is_made_again(tmp_path):
    def load(path, bench):
        if not loads:
            path.unlink()
        loads.append(path)
        return path.read_text()

    loads = []
    assert get(tmp_path, stage(load=load)) == "content"
    assert len(loads) == 2


def test_a_failed_make_or_save_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        get(tmp_path, stage(never))

    def fail(made, path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device while writing: '.*txt'"):
        get(tmp_path, stage(save=fail))
    assert [p.name for p in (tmp_path / "deep").iterdir() if p.suffix != ".lock"] == []
    assert get(tmp_path, stage()) == "content"


def test_nothing_is_stored_where_the_names_have_come_to_mean_something_else(tmp_path):
    def verify():
        raise ValueError("changed")

    bench = Bench(Execution(store=tmp_path), verify=verify)
    with pytest.raises(ValueError, match="changed"):
        obtain([stage()], bench)
    assert not stage().path(tmp_path).exists()


def test_stages_of_one_pass_are_made_together_and_only_what_is_missing(tmp_path):
    passes = []

    def make(stages, inputs, bench):
        passes.append([one.member for one in stages])
        return [Made(f"text {one.member}") for one in stages]

    a, b, c = (stage(make, member=member) for member in "abc")
    assert len({a.key, b.key, c.key}) == 3
    bench = Bench(Execution(store=tmp_path))
    assert obtain([a, b, a], bench) == ["text a", "text b", "text a"]
    assert obtain([c, b], bench) == ["text c", "text b"]
    other = stage(make, member="a", reads={"a": 2})
    assert obtain([other, a], bench) == ["text a", "text a"]
    assert passes == [["a", "b"], ["c"], ["a"]]


def test_inputs_are_made_first_and_their_costs_add_up(tmp_path):
    made = []

    def make(name):
        def run(stages, inputs, bench):
            made.append((name, list(inputs)))
            return [Made(name) for _ in stages]

        return run

    first = stage(make("first"), kind="first")
    second = stage(make("second"), kind="second", inputs=(first,))
    for store in (tmp_path, None):
        made.clear()
        bench = Bench(Execution(store=store))
        assert obtain([second], bench) == ["second"]
        assert obtain([second], bench) == ["second"]
        assert made == [("first", []), ("second", ["first"])]
        assert set(bench.note(second).costs) == {"first", "second"}
    assert second.key != stage(make("second"), kind="second").key


def test_a_file_of_another_user_is_one_line(tmp_path, monkeypatch):
    get(tmp_path, stage())

    def refused(*_):
        raise PermissionError(13, "Permission denied", "x.bin")

    monkeypatch.setattr(artifacts, "_sha256", refused)
    with pytest.raises(PermissionError, match=r"^x.bin may not be read by this user; make it readable, or use anot"):
        get(tmp_path, stage())


def test_files_have_the_mode_of_the_umask(tmp_path):
    def private(made, path):
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_text(made.value)

    before = os.umask(0o002)
    try:
        get(tmp_path, stage(save=private))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "deep").iterdir() if path.suffix != ".lock"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o664}
    assert len(files) == 2


def _note_and_make(stages, inputs, bench):
    with Path(os.environ["STAGE_NOTES"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    return [Made("content") for _ in stages]


def _get_noted(results: Path) -> None:
    assert get(results, stage(_note_and_make)) == "content"


def test_what_the_maker_kept_to_go_on_from_goes_once_the_artifact_is_there(tmp_path, monkeypatch):
    def make(stages, inputs, bench):
        own = stages[0].path(tmp_path)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.with_suffix(".half").write_text("half")
        return [Made("content")]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    own = stage(make, scratch=(".half",))
    half = own.path(tmp_path).with_suffix(".half")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            get(tmp_path, own)
    assert half.exists()
    assert get(tmp_path, own) == "content"
    assert not half.exists()


def test_two_processes_make_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGE_NOTES", str(tmp_path / "notes"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_get_noted, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((tmp_path / "notes").read_text().splitlines()) == 1


def test_parts_are_made_once_also_after_a_line_was_cut_short(tmp_path):
    path = tmp_path / "x.parts"
    values = {0: [1, 0.1, float("-inf")], 1: ["blå"], 2: [{"a": [2]}]}
    parts = Parts(path)
    for number, value in values.items():
        parts.add(number, value)
        assert parts[number] == value
    again = Parts(path)
    assert {number: again[number] for number in values} == values
    path.write_bytes(path.read_bytes()[:-5])
    cut = Parts(path)
    assert cut[1] == values[1]
    assert 2 not in cut
    cut.add(2, [3])
    assert Parts(path)[2] == [3]
    flipped = path.read_bytes().replace(b"0.1", b"0.2")
    path.write_bytes(flipped)
    assert 0 not in Parts(path)
