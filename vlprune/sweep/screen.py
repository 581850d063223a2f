"""Where a sweep prints: it goes on, and stores all, whatever becomes of its terminal."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

from rich.console import Console


def console() -> Console:
    """The console of this process: characters that the terminal lacks are replaced, a reader that is gone is let go."""
    # A descriptor that is closed would be taken by the next file that is opened, here or in a process that is started.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    stream = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    # A file or a pipe has no width; the tables set it.
    return Console(file=_Lasting(stream), width=None if stream.isatty() else 160)  # pyright: ignore[reportArgumentType]


class _Lasting:
    """A stream that takes what is written even when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
