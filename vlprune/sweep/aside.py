"""The planner in a process of its own, so that the sweep itself needs neither torch nor its memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
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
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            memory = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise ConfigError(f"the process that looks at models and data {how}{memory}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(connection: Connection) -> None:
    """Answers questions until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    planner = import_module("vlprune.sweep.planner").Planner()
    with suppress(EOFError, OSError):  # the sweep has ended
        while True:
            what, args, options = connection.recv()
            try:
                answer = getattr(planner, what)(*args, **options)
            except Exception as error:  # it belongs to who asked
                if not isinstance(error, ConfigError | OSError):
                    error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)
