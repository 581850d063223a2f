"""Leases: one worker at a time, whatever happens to it."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from vlprune.execution import Interrupted
from vlprune.store import lease
from vlprune.store.doing import say
from vlprune.store.lease import Busy, claimed, claimed_at_once, clear, holder, lease_path
from vlprune.store.place import place

SPAWN = multiprocessing.get_context("spawn")


def others(path, **changes):
    """A lease that somebody else left."""
    values = {"token": "t", "place": "0" * 12, "pid": 1, "host": "elsewhere", "since": 0.0, "doing": "fine-tuning"}
    lease_path(path).write_text(json.dumps({**values, **changes}))


@pytest.fixture
def quick(monkeypatch):
    """Leases that show signs of life often and are stale soon."""
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.5), ("PATIENCE", 0.1), ("POLL", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


def hold(path, log, seconds):
    """Holds a lease for a while and notes when."""
    lease.BEAT, lease.STALE, lease.POLL = 0.05, 0.5, 0.01
    with claimed([path]):
        with log.open("a") as file:
            file.write(f"in {time.monotonic()}\n")
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"out {time.monotonic()}\n")


def test_a_lease_ends_with_its_block_and_may_be_claimed_again_by_its_thread(tmp_path):
    path = tmp_path / "deep" / "x"
    with claimed([path, path]), claimed_at_once([path]):
        assert lease_path(path).exists()
        with claimed([path]):
            pass
        assert lease_path(path).exists()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), claimed([path]):
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []


def test_another_thread_waits(tmp_path, quick):
    path, order = tmp_path / "x", []

    def work():
        with claimed([path]):
            order.append("second")

    with claimed([path]):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_several_processes_hold_a_lease_one_after_another(tmp_path):
    path, log = tmp_path / "x", tmp_path / "log"
    processes = [SPAWN.Process(target=hold, args=(path, log, 0.05)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["in", "out"] * 4
    assert [own.name for own in tmp_path.iterdir()] == ["log"]


def test_who_holds_a_lease_is_said_and_waited_for(tmp_path, quick, caplog):
    path = tmp_path / "x"
    others(path)
    assert holder(path).holder == "process 1 on elsewhere"
    assert holder(path).doing == "fine-tuning"
    with pytest.raises(Busy, match="process 1 on elsewhere"), claimed_at_once([path]):
        pass
    with claimed([path]):  # it has shown no sign of life for long enough
        assert holder(path).holder.startswith(f"process {os.getpid()} on ")
    assert "process 1 on elsewhere is at work on" in caplog.text
    assert not lease_path(path).exists()


def test_a_lease_that_changes_is_not_stale(tmp_path, quick):
    path, stop = tmp_path / "x", threading.Event()
    others(path)

    def live():
        while not stop.wait(0.05):
            others(path, doing=str(time.monotonic()))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        end = time.monotonic() + 1.5
        with pytest.raises(Interrupted), claimed([path], lambda: time.monotonic() > end):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_holder_that_ended_here_is_not_waited_for(tmp_path):
    path = tmp_path / "x"
    others(path, place=place(), pid=999999999)
    assert holder(path) is None
    with claimed_at_once([path]):
        assert holder(path) is not None


def test_a_lease_is_cleared_where_its_holder_is_known_to_have_ended(tmp_path):
    path = tmp_path / "x"
    clear(path)
    for changes, left in (({"place": place(), "pid": 999999999}, False), ({"place": "elsewhere"}, True)):
        others(path, **changes)
        clear(path)
        assert lease_path(path).exists() == left
    lease_path(path).unlink()
    with claimed_at_once([path]):
        clear(path)
        assert lease_path(path).exists()


def test_a_killed_holder_is_not_waited_for_and_a_stopped_one_for_a_while(tmp_path):
    path, log = tmp_path / "x", tmp_path / "log"
    for how in (signal.SIGKILL, signal.SIGSTOP):
        log.unlink(missing_ok=True)
        process = SPAWN.Process(target=hold, args=(path, log, 600))
        process.start()
        end = time.monotonic() + 60
        while not log.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(process.pid, how)
        if how == signal.SIGKILL:
            process.join()
        began = time.monotonic()
        other = SPAWN.Process(target=hold, args=(path, log, 0.0))
        other.start()
        other.join(timeout=60)
        assert other.exitcode == 0
        assert time.monotonic() - began < 30
        if how == signal.SIGSTOP:
            process.kill()
            process.join()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"token": 1}', "\0"])
def test_a_damaged_lease_is_waited_for_and_then_taken(tmp_path, quick, text):
    path = tmp_path / "x"
    lease_path(path).write_text(text)
    with pytest.raises(Busy, match="somebody"), claimed_at_once([path]):
        pass
    with claimed([path]):
        assert holder(path).holder.startswith(f"process {os.getpid()} ")


def test_a_clock_that_jumps_makes_no_lease_stale(tmp_path, quick, monkeypatch):
    path = tmp_path / "x"
    others(path)
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
        os.utime(lease_path(path), (1.7e9 + jump, 1.7e9 + jump))
        with pytest.raises(Busy), claimed_at_once([path]):
            pass


def test_a_lease_that_was_taken_away_is_not_given_back(tmp_path):
    path = tmp_path / "x"
    with claimed([path]):
        others(path)  # somebody thought that this process was gone
    assert json.loads(lease_path(path).read_text())["host"] == "elsewhere"


def test_a_new_lease_is_not_taken_for_the_stale_one_before_it(tmp_path):
    path = tmp_path / "x"
    others(path, token="old")
    stale = lease._look(lease_path(path))
    others(path, token="new")
    lease._take_away(lease_path(path), stale)
    assert json.loads(lease_path(path).read_text())["token"] == "new"
    assert [own.name for own in tmp_path.iterdir()] == ["x.lease"]


def test_what_a_holder_does_is_in_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    path = tmp_path / "x"
    with claimed([path]):
        say("fine-tuning, step 3 of 40")
        end = time.monotonic() + 20
        while holder(path).doing != "fine-tuning, step 3 of 40":
            assert time.monotonic() < end
            time.sleep(0.02)
