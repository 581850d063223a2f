"""Place: where a process runs, so that others can tell whether it still does."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


@cache
def place() -> str:
    """12 hexadecimal digits, the same for processes that see each other by their numbers; "" where nothing tells.

    They stand for the machine since its start and the namespace of process numbers: two containers of one host name
    are two places.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
        return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:12]
    return ""


def ended(where: str, pid: int) -> bool:
    """Whether a process is known to have ended: it ran in this place, and there is none of its number any more."""
    return where != "" and where == place() and not psutil.pid_exists(pid)
