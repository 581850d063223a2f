"""Identity: what a file or folder looks like without being read, which changes with every change of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

SETTLED = 2.0  # seconds after which a further change of a file is sure to show in its times

Identity = tuple[int, ...]


def identity(path: str | os.PathLike[str]) -> Identity:
    """Device, inode, size, and times of the last change of contents and of anything, in nanoseconds.

    The last one no program can set back; of a folder it tells of every name that comes or goes.

    Raises:
        OSError: there is no such file, or it may not be looked at.
    """
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def identities(paths: Iterable[str]) -> dict[str, Identity]:
    """{path: its identity}; OSError as of `identity`."""
    return {path: identity(path) for path in paths}


def settled(found: Mapping[str, Identity]) -> bool:
    """Whether the next change of each of them is sure to show: none was changed in the last two seconds."""
    return all(max(times[3:]) < (time.time() - SETTLED) * 1e9 for times in found.values())
