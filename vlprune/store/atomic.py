"""A file that is there in full or not at all."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import psutil


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block, or nothing if the block fails.

    The content is on the disk before the name changes, and the file has the mode that the umask says. What killed
    processes of this host left half-written in the directory is removed.

    Raises:
        OSError: the file cannot be written, for example on a full disk; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = platform.node()
    # Whatever was to be written: a block inside a block leaves a file that is named after a half-written one.
    for stale in path.parent.glob(f".*.{escape(host)}.*.tmp"):
        pid = stale.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            stale.unlink(missing_ok=True)
    half = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    try:
        # Some writers make their files private; the mode is the one that any new file gets.
        half.touch()
        mode = half.stat().st_mode
        yield half
        half.chmod(mode)
        with half.open("rb+") as file:
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror or error} while writing", str(path)) from error
    finally:
        with suppress(FileNotFoundError):
            half.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there in full or not at all (see `atomic`)."""
    with atomic(path) as half:
        half.write_text(text, encoding="utf-8")
