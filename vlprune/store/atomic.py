"""A file that is there in full or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlprune.store.place import ended, place

# What fails every write alike: a disk that is full or may not be written to.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
ABANDONED = 3600.0  # seconds after which a half-written file of another place is taken for abandoned
_HALF = re.compile(r"\..*\.(?P<place>[0-9a-f]{12}|)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block, or nothing if the block fails.

    The content is on the disk before the name changes, and the file has the mode that the umask says. What killed
    processes left half-written in the directory is removed: at once where it is known that they ended, else when it is
    an hour older than what is written now.

    Raises:
        OSError: the file cannot be written, for example on a full disk; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{place()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        # Some writers make their files private; the mode is the one that any new file gets.
        half.touch()
        mode = half.stat().st_mode
        _remove_abandoned(path.parent, half.stat().st_mtime)
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


def _remove_abandoned(directory: Path, now: float) -> None:
    """Removes half-written files, whatever was to be written: a block inside a block leaves one named after another.

    Args:
        directory: where they are.
        now: the time, as the file system of the directory has it.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            if (found := _HALF.fullmatch(entry.name)) is None:
                continue
            with suppress(FileNotFoundError):
                if ended(found["place"], int(found["pid"])) or now - entry.stat().st_mtime > ABANDONED:
                    os.unlink(entry.path)
