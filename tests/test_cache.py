import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from vlprune.store import cache
from vlprune.store.cache import cached


def _make() -> str:
    return "content"


def _save(value: str, path: Path) -> None:
    path.write_text(value)


def _get(path: Path, make=_make) -> str:
    return cached(path, make=make, save=_save, load=Path.read_text)


def _never() -> str:
    raise AssertionError("made again")


def test_a_value_is_made_once_and_read_then(tmp_path):
    path = tmp_path / "deep" / "x.bin"
    assert _get(path) == "content"
    assert _get(path, _never) == "content"


@pytest.mark.parametrize("damage", ["conten", "c0ntent", "content!", ""])
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path, caplog, damage):
    path = tmp_path / "x.bin"
    _get(path)
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert _get(path) == "content"
    assert f"{path} is damaged" in caplog.text
    assert _get(path, _never) == "content"


def test_a_damaged_checksum_is_made_again(tmp_path):
    path = tmp_path / "x.bin"
    _get(path)
    (tmp_path / "x.bin.sha256").write_bytes(b"\xff\xfe")
    assert _get(path) == "content"


def test_a_failed_make_or_save_leaves_nothing(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(AssertionError, match="made again"):
        _get(path, _never)

    def fail(value, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device while writing: '.*x.bin'"):
        cached(path, make=_make, save=fail, load=Path.read_text)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    assert _get(path) == "content"


def test_a_file_of_another_user_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    _get(path)

    def refused(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "_sha256", refused)
    with pytest.raises(PermissionError, match=r"^.*x.bin may not be read by this user; make it readable, or use anot"):
        _get(path)


def test_files_have_the_mode_of_the_umask(tmp_path):
    def private(value, path):
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_text(value)

    before = os.umask(0o002)
    try:
        cached(tmp_path / "x.bin", make=_make, save=private, load=Path.read_text)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert modes == {"x.bin": 0o664, "x.bin.sha256": 0o664}


def _note_and_make() -> str:
    with Path(os.environ["CACHE_NOTES"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    return "content"


def test_two_processes_make_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_NOTES", str(tmp_path / "notes"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_get, args=(tmp_path / "x.bin", _note_and_make)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((tmp_path / "notes").read_text().splitlines()) == 1
