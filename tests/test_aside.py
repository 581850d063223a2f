"""The planner in a process of its own: what the sweep hears of it, however that ends."""

import multiprocessing
import os
import signal
import threading

import pytest

from vlprune.config import ConfigError
from vlprune.sweep import aside
from vlprune.sweep.aside import PlannerAside


def test_a_planner_that_says_nothing_more_is_ended_and_said_in_one_line(monkeypatch):
    with PlannerAside() as planner:
        assert isinstance(planner.devices(), list)
        monkeypatch.setattr(aside, "SILENT", 1.0)
        monkeypatch.setattr(aside, "BEAT", 0.1)
        pid = planner._process.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ConfigError, match=r"said nothing for 1 seconds and was ended"):
            planner.devices()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_planner_says_that_it_is_at_work_while_a_question_is_open(monkeypatch):
    monkeypatch.setattr(aside, "BEAT", 0.05)
    ours, theirs = multiprocessing.Pipe()
    asked, speaking = threading.Event(), threading.Lock()
    thread = threading.Thread(target=aside._beat, args=(theirs, asked, speaking), daemon=True)
    thread.start()
    assert not ours.poll(0.5)
    asked.set()
    assert [ours.recv() for _ in range(3)] == [aside.ALIVE] * 3
    with speaking:
        asked.clear()
    while ours.poll(0.2):
        ours.recv()
    assert not ours.poll(0.5)
    ours.close()
    asked.set()
    thread.join(timeout=60)
    assert not thread.is_alive()
