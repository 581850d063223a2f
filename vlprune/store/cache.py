"""Files that are made once and then read, also by several processes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from vlprune.store.atomic import atomic, write_text

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cached(path: Path, *, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
    """What is stored at path, made and stored first where nothing is.

    Processes that ask for the same path at the same time wait for the one that makes it. A checksum beside the file
    tells a damaged one, which is made again, with a warning. What comes back went through the file in every case, so
    that a first and a later run see the same values.

    Args:
        path: of the file; its name should be a digest of all that the content depends on.
        make: () -> value.
        save: (value, path) writes the file.
        load: (path) -> value.

    Raises:
        OSError: the file cannot be written, for example on a full disk, or may not be read.
    """
    if not _intact(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not _intact(path):
                if path.exists():
                    logger.warning("%s is damaged and is made again", path)
                value = make()
                with atomic(path) as half:
                    save(value, half)
                    # The checksum comes first: a crash in between leaves a pair that does not match.
                    write_text(_checksum(path), _sha256(half))
    return load(path)


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _intact(path: Path) -> bool:
    try:
        return _checksum(path).read_text(encoding="utf-8") == _sha256(path)
    except (FileNotFoundError, UnicodeDecodeError):
        return False
    except PermissionError as error:
        raise PermissionError(
            f"{error.filename} may not be read by this user; make it readable, or use another results directory"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
