import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from vlprune.cache import cached


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
