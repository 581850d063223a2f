"""The planner in a process of its own, so that the sweep itself needs neither torch nor its memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from vlprune.config import ConfigError, RunConfig
from vlprune.store.identity import Identity
from vlprune.sweep.options import Options
from vlprune.sweep.plan import Plan
from vlprune.sweep.process import child_environment

ALIVE = "alive"  # what the process says while it looks for an answer
BEAT = 5.0  # seconds between two times
SILENT = 300.0  # seconds without, after which it is ended: a library that runs out of memory may loop for ever


class PlannerAside:
    """A `sweep.planner.Planner` in another process, which is started when it is first asked and ends with the block."""

    def __init__(self) -> None:
        self._process: Any = None

    def plan(self, options: Options) -> tuple[Plan, dict[str, Identity]]:
        """As of the planner."""
        return self._ask("plan", options)

    def check(self, configs: Iterable[RunConfig], *, skip_broken: bool) -> list[str]:
        """As of the planner."""
        return self._ask("check", list(configs), skip_broken=skip_broken)

    def devices(self) -> list[str]:
        """As of the planner."""
        return self._ask("devices")

    def __enter__(self) -> PlannerAside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._connection.close()
            self._process.terminate()
            self._process.join()
            self._process = None

    def _ask(self, what: str, *args: Any, **options: Any) -> Any:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with child_environment({}):
                self._process.start()
            theirs.close()
        try:
            self._connection.send((what, args, options))
            while (answer := self._heard()) == ALIVE:
                pass
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            memory = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise ConfigError(f"the process that looks at models and data {how}{memory}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _heard(self) -> Any:
        """What the process says next.

        Raises:
            ConfigError: it says nothing, not even that it is at work; it has been ended.
            OSError, EOFError: it has ended.
        """
        # Once more, for a sweep that was itself suspended meanwhile.
        if self._connection.poll(SILENT) or self._connection.poll(2 * BEAT):
            return self._connection.recv()
        self._process.kill()
        self.close()
        raise ConfigError(
            f"the process that looks at models and data said nothing for {SILENT:.0f} seconds and was ended "
            "(suspended, or out of memory?)"
        )


def _serve(connection: Connection) -> None:
    """Answers questions until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    asked, speaking = threading.Event(), threading.Lock()
    asked.set()
    threading.Thread(target=_beat, args=(connection, asked, speaking), daemon=True).start()
    planner = import_module("vlprune.sweep.planner").Planner()
    with suppress(EOFError, OSError):  # the sweep has ended
        while True:
            what, args, options = connection.recv()
            asked.set()
            try:
                answer = getattr(planner, what)(*args, **options)
            except Exception as error:  # it belongs to who asked
                if not isinstance(error, ConfigError | OSError):
                    error.add_note(traceback.format_exc())
                answer = error
            with speaking:
                asked.clear()
                connection.send(answer)


def _beat(connection: Connection, asked: threading.Event, speaking: threading.Lock) -> None:
    """Says every few seconds that an answer is being looked for."""
    with suppress(OSError):  # the sweep has ended
        while asked.wait():
            time.sleep(BEAT)
            with speaking:
                if asked.is_set():
                    connection.send(ALIVE)
