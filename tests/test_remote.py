"""A remote: what is copied when, and what is never accepted."""

from pathlib import Path

import fsspec
import pytest
import torch
from test_artifacts import never, stage

from vlprune.config import ConfigError
from vlprune.execution import Execution, Interrupted
from vlprune.finetune.checkpoint import Checkpoint
from vlprune.stages.stage import Bench, Made, obtain
from vlprune.store.artifacts import Note, intact, note_path, read_note, written
from vlprune.store.remote import NOWHERE, ObjectStore, RemoteError, remote_of
from vlprune.store.weights import TEMPORARY, settle


@pytest.fixture
def url(tmp_path):
    """A remote in the memory of this process, which is gone after the test."""
    own = f"memory://{tmp_path.name}/prefix"
    yield own
    system, base = fsspec.core.url_to_fs(own)
    if system.exists(base):
        system.rm(base, recursive=True)


def store(path, content="content", **facts):
    with written(path, Note(facts=facts)) as half:
        half.write_text(content)
    return path


def objects(url):
    """{name: content} of all objects."""
    system, base = fsspec.core.url_to_fs(url)
    return {name[len(base) + 1 :]: system.cat_file(name) for name in system.find(base)}


def change(url, name, content):
    system, base = fsspec.core.url_to_fs(url)
    if content is None:
        system.rm_file(f"{base}/{name}")
    else:
        system.pipe_file(f"{base}/{name}", content)


def test_what_one_mirror_pushes_another_fetches_byte_for_byte(tmp_path, url):
    a, b = tmp_path / "a", tmp_path / "b"
    path = store(a / "deep" / "file.txt", length=7)
    here, there = ObjectStore(url, a), ObjectStore(url, b)
    assert not here.has(path)
    here.push(path)
    assert here.has(path)
    assert there.listing() == {Path("deep/file.txt"), Path("deep/file.txt.note")}
    assert there.note(b / "deep" / "file.txt") == read_note(path)
    assert there.fetch(b / "deep" / "file.txt")
    for name in ("file.txt", "file.txt.note"):
        assert (b / "deep" / name).read_bytes() == (a / "deep" / name).read_bytes()
    there.remove(b / "deep" / "file.txt")
    assert not here.has(path)
    assert intact(path)


def test_what_the_remote_lacks_is_no_error(tmp_path, url):
    remote, path = ObjectStore(url, tmp_path), tmp_path / "file.txt"
    remote.check()
    assert remote.listing() == frozenset()
    assert not remote.fetch(path)
    assert not remote.fetch_file(path)
    assert remote.note(path) is None
    remote.remove(path)
    assert not list(tmp_path.iterdir())


def test_what_is_here_already_is_not_copied_again(tmp_path, url):
    remote, path = ObjectStore(url, tmp_path), store(tmp_path / "file.txt")
    remote.push(path)
    change(url, "file.txt", b"damaged")
    assert remote.fetch(path)
    assert path.read_text() == "content"


DAMAGES = {
    "the file is missing": {"file.txt": None},
    "the note is missing": {"file.txt.note": None},
    "the file is cut short": {"file.txt": b"conten"},
    "the file is another one": {"file.txt": b"c0ntent"},
    "the note is damaged": {"file.txt.note": b"{}"},
    "the note is no text": {"file.txt.note": b"\xff"},
    "the note is empty": {"file.txt.note": b""},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pair_that_is_damaged_or_there_in_part_counts_as_not_there(tmp_path, url, damage):
    a, b = tmp_path / "a", tmp_path / "b"
    ObjectStore(url, a).push(store(a / "file.txt"))
    for name, content in DAMAGES[damage].items():
        change(url, name, content)
    assert not ObjectStore(url, b).fetch(b / "file.txt")
    assert not list(b.rglob("*"))
    own = store(b / "file.txt", "own")
    assert not ObjectStore(url, b).fetch(own)
    assert intact(own)
    assert own.read_text() == "own"


def test_weights_that_were_never_stored_are_not_fetched(tmp_path, url):
    a, b = tmp_path / "a", tmp_path / "b"
    path = store(a / "file.txt")
    path.unlink()
    note_path(path).write_text(note_path(path).read_text())
    ObjectStore(url, a).push_file(note_path(path))
    assert not ObjectStore(url, b).fetch(b / "file.txt")
    assert not list(b.rglob("*"))


def get(results, url, own):
    [value] = obtain([own], Bench(Execution(store=results, remote=url)))
    return value


def test_a_stage_is_made_by_one_machine_for_all(tmp_path, url):
    assert get(tmp_path / "a", url, stage()) == "content"
    assert get(tmp_path / "b", url, stage(never)) == "content"
    paths = [stage().path(tmp_path / name) for name in ("a", "b")]
    assert note_path(paths[0]).read_bytes() == note_path(paths[1]).read_bytes()


@pytest.mark.parametrize("damage", [None, b"content!"])
def test_a_stage_that_is_damaged_at_the_remote_is_made_and_pushed_again(tmp_path, url, caplog, damage):
    get(tmp_path / "a", url, stage())
    name = stage().path(tmp_path / "a").relative_to(tmp_path / "a").as_posix()
    change(url, name, damage)
    made = []
    other = stage(lambda stages, inputs, bench: made.append(0) or [Made("content")])
    assert get(tmp_path / "b", url, other) == "content"
    assert made == [0]
    assert objects(url)[name] == b"content"
    assert ("is damaged in memory:" in caplog.text) == (damage is not None)
    assert get(tmp_path / "c", url, stage(never)) == "content"


def test_what_could_not_be_pushed_is_kept_and_pushed_next_time(tmp_path, url, monkeypatch):
    def refuse(self, path):
        raise RemoteError(self.url, "no network")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "push", refuse)
        with pytest.raises(RemoteError, match=r"^remote memory://.*: no network$"):
            get(tmp_path, url, stage())
    assert objects(url) == {}
    assert get(tmp_path, url, stage(never)) == "content"
    assert get(tmp_path / "other", url, stage(never)) == "content"


def test_what_only_one_machine_has_is_pushed_when_it_is_needed(tmp_path, url):
    get(tmp_path / "a", None, stage())
    get(tmp_path / "a", url, stage(never))
    assert get(tmp_path / "b", url, stage(never)) == "content"


def test_what_lies_beside_an_artifact_is_pushed_and_what_was_half_made_is_removed(tmp_path, url):
    def make(stages, inputs, bench):
        path = stages[0].path(tmp_path)
        for suffix in (".half", ".beside"):
            path.with_suffix(suffix).write_text("text")
            bench.remote.push_file(path.with_suffix(suffix))
        return [Made("content")]

    own = stage(make, scratch=(".half",), beside=(".beside",))
    get(tmp_path, url, own)
    assert {Path(name).suffix for name in objects(url)} == {".txt", ".note", ".beside"}


def test_training_goes_on_from_the_checkpoint_of_another_machine(tmp_path, url, caplog):
    def checkpoint(name, **options):
        path = tmp_path / name / "key.checkpoint"
        return Checkpoint(path, 0.0, remote=ObjectStore(url, tmp_path / name), **options)

    first, second = checkpoint("a"), checkpoint("b", stopping=lambda: True)
    assert first.read() is None
    first.after_step(lambda: {"step": torch.tensor(1)})
    assert second.read() == {"step": torch.tensor(1)}
    with pytest.raises(Interrupted):
        second.after_step(lambda: {"step": torch.tensor(2)})
    assert checkpoint("a").read() == {"step": torch.tensor(2)}


def test_a_checkpoint_that_cannot_be_pushed_does_not_stop_the_training(tmp_path, url, monkeypatch, caplog):
    def refuse(self, path):
        raise RemoteError(self.url, "no network")

    monkeypatch.setattr(ObjectStore, "push", refuse)
    own = Checkpoint(tmp_path / "key.checkpoint", 0.0, remote=ObjectStore(url, tmp_path))
    own.after_step(lambda: {"step": torch.tensor(1)})
    assert "is on this machine alone: remote memory:" in caplog.text
    assert own.read() == {"step": torch.tensor(1)}


@pytest.mark.parametrize(("keep", "left"), [(None, False), ("none", False), ("all", True), ("best", True)])
def test_weights_that_are_settled_are_settled_at_the_remote(tmp_path, url, keep, left):
    remote, path = ObjectStore(url, tmp_path), store(tmp_path / "weights", **{TEMPORARY: True})
    remote.push(path)
    path.unlink()  # a worker of another machine has them
    settle(path, keep, remote)
    assert remote.has(path) == left
    note = remote.note(path)
    assert note is not None
    assert note.facts[TEMPORARY] != left
    assert remote.fetch(path) == left
    settle(path, None, remote)
    assert remote.has(path) == left


def test_a_file_system_that_is_not_known_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^remote nosuch://bucket/x: Protocol not known: nosuch$"):
        ObjectStore("nosuch://bucket/x", tmp_path).check()


@pytest.mark.parametrize("url", ["bucket/x", "/bucket", "s3://", "s3:///x", ""])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match=r"^remote must be a URL such as s3://BUCKET/PREFIX beside a store, got "):
        Execution(remote=url)
    with pytest.raises(ConfigError, match=r"^remote must be a URL"):
        Execution(store=None, remote="s3://bucket/x")


def test_without_a_remote_nothing_is_copied(tmp_path):
    remote = remote_of(Execution(store=tmp_path))
    assert remote is NOWHERE
    assert remote.listing() is None
    assert remote.has(tmp_path / "file")
    assert not remote.fetch(tmp_path / "file")
