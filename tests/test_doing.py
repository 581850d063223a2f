"""What a process says of what it does, and of the time that is left."""

from types import SimpleNamespace

import pytest

from vlprune.store import doing as module
from vlprune.store.doing import clock, doing, say, say_step


@pytest.fixture
def at(monkeypatch):
    """Sets the time; nothing was said before."""
    say("")
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=0.0)
    monkeypatch.setattr(module, "time", now)
    return lambda seconds: setattr(now, "seconds", seconds)


def test_the_time_left_is_that_at_the_pace_of_the_steps_of_this_process(at):
    say("tuned")
    at(100)
    say_step("step 300 of 400", 300, 400)  # another process did these
    assert doing() == "step 300 of 400"
    at(110)
    say_step("step 305 of 400", 305, 400)
    assert doing() == "step 305 of 400, 3:10 left"
    at(120)
    assert doing() == "step 305 of 400, 3:00 left"
    at(1000)  # slower than before
    assert doing() == "step 305 of 400, 0:00 left"
    at(1100)
    say_step("step 310 of 400", 310, 400)
    assert doing() == "step 310 of 400, 2:30:00 left"


def test_what_comes_next_has_a_pace_of_its_own(at):
    say_step("step 0 of 2", 0, 2)
    at(50)
    say_step("step 1 of 2", 1, 2)
    assert doing() == "step 1 of 2, 0:50 left"
    say("predictions")
    assert doing() == "predictions"
    say_step("part 1 of 9", 0, 9)
    assert doing() == "part 1 of 9"
    at(51)
    say_step("part 2 of 9", 1, 9)
    assert doing() == "part 2 of 9, 0:08 left"


def test_seconds_on_a_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
