"""Remote: an object store that results directories are mirrors of, for machines that share no file system.

Files have the names there that they have below the results directory. An artifact counts only where its file is the one
that its note describes: what was copied in part, or by two machines at once, counts as not there.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from vlprune import escapes
from vlprune.config import ConfigError
from vlprune.execution import Execution
from vlprune.store.artifacts import Note, describes, intact, note_path, parse_note
from vlprune.store.atomic import DISK, atomic

logger = logging.getLogger(__name__)


class RemoteError(OSError):
    """A remote that cannot be reached, read or written to.

    Args:
        url: the remote.
        reason: what it or the way to it says, in one line.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(errno.EIO, reason, url)

    def __str__(self) -> str:
        return f"remote {self.filename}: {self.strerror}"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteError, (self.filename, self.strerror)


class Remote:
    """Where artifacts are beside the results directory; this one is nowhere, and the results directory has them all."""

    def check(self) -> None:
        """Refuses a remote that cannot be written to.

        Raises:
            ConfigError: it cannot be reached, or a package, a bucket, credentials or a permission are missing.
        """

    def listing(self) -> frozenset[Path] | None:
        """The files at the remote, as paths below the results directory; None where there is no remote."""
        return None

    def has(self, _path: Path) -> bool:
        """Whether an artifact that is here is at the remote as well: its file and its note."""
        return True

    def note(self, _path: Path) -> Note | None:
        """The note of an artifact at the remote; None where there is none, or a damaged one."""
        return None

    def fetch(self, _path: Path) -> bool:
        """Copies an artifact from the remote unless it is here already; whether it is here then and intact."""
        return False

    def fetch_file(self, _path: Path) -> bool:
        """Copies a file that has no note from the remote; whether it is there."""
        return False

    def push(self, _path: Path) -> None:
        """Copies an artifact to the remote: its file, then its note."""

    def push_file(self, _path: Path) -> None:
        """Copies a file that has no note, or a note alone, to the remote."""

    def remove(self, _path: Path) -> None:
        """Deletes a file, and no note, at the remote, where there is one."""


NOWHERE = Remote()


def remote_of(execution: Execution) -> Remote:
    """The remote that an execution names."""
    if execution.remote is None or execution.store is None:
        return NOWHERE
    return ObjectStore(execution.remote, execution.store)


class ObjectStore(Remote):
    """A remote that fsspec knows how to reach, such as S3; all but `check` raises a RemoteError where it fails.

    Args:
        url: such as "s3://BUCKET/PREFIX".
        results: the results directory.
    """

    def __init__(self, url: str, results: Path) -> None:
        self.url, self.results = url, results

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        from fsspec.core import url_to_fs  # whoever has no remote need not wait for it

        options = {"auto_mkdir": True} if self.url.startswith("file:") else {}
        try:
            system, base = url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            extra = ": pip install 'vlprune[s3]'" if self.url.startswith("s3") else ""
            raise RemoteError(self.url, f"{escapes.reason(error)}{extra}") from None
        except ValueError as error:
            raise self._failed(error) from None
        return system, base.rstrip("/")

    def _name(self, path: Path) -> str:
        return f"{self._place[1]}/{path.relative_to(self.results).as_posix()}"

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """The file system; FileNotFoundError where it has no such object, RemoteError where it fails otherwise."""
        system, _ = self._place
        try:
            yield system
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has errors of its own
            if isinstance(error, OSError) and error.errno in DISK:  # the disk of this machine
                raise
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> RemoteError:
        return RemoteError(self.url, escapes.reason(error))

    def _read(self, path: Path) -> bytes | None:
        try:
            with self._asking() as system:
                return system.cat_file(self._name(path))
        except FileNotFoundError:
            return None

    def check(self) -> None:
        """As of `Remote`; writes an object and deletes it."""
        probe = self.results / f"probe-{secrets.token_hex(8)}"
        try:
            with self._asking() as system:
                system.pipe_file(self._name(probe), b"vlprune")
            self.remove(probe)
        except (RemoteError, FileNotFoundError) as error:
            failed = error if isinstance(error, RemoteError) else self._failed(error)
            raise ConfigError(str(failed)) from None

    def listing(self) -> frozenset[Path]:
        """As of `Remote`."""
        base = self._place[1]
        try:
            with self._asking() as system:
                return frozenset(Path(name[len(base) + 1 :]) for name in system.find(base))
        except FileNotFoundError as error:
            raise self._failed(error) from None

    def has(self, path: Path) -> bool:
        """As of `Remote`; does not look at contents."""
        try:
            with self._asking() as system:
                for each in (path, note_path(path)):
                    system.info(self._name(each))
        except FileNotFoundError:
            return False
        return True

    def note(self, path: Path) -> Note | None:
        """As of `Remote`."""
        text = self._read(note_path(path))
        return None if text is None else parse_note(text)

    def fetch(self, path: Path) -> bool:
        """As of `Remote`; what is there in part, or damaged, is not copied."""
        if (text := self._read(note_path(path))) is None:
            return False
        with suppress(FileNotFoundError):
            if note_path(path).read_bytes() == text and intact(path):
                return True
        note = parse_note(text)
        if note is not None and not note.sha256:  # one that was never stored
            return False
        try:
            with atomic(path) as half:
                self._get(path, half)
                if note is None or not describes(note, half):
                    raise _Torn
                # The note comes first, as where the artifact was made.
                with atomic(note_path(path)) as own:
                    own.write_bytes(text)
        except _Torn:
            logger.warning("%s is damaged in %s and counts as not there", path.relative_to(self.results), self.url)
            return False
        except _Gone:
            return False
        return True

    def fetch_file(self, path: Path) -> bool:
        """As of `Remote`."""
        try:
            with atomic(path) as half:
                self._get(path, half)
        except _Gone:
            return False
        return True

    def _get(self, path: Path, half: Path) -> None:
        try:
            with self._asking() as system:
                system.get_file(self._name(path), str(half))
        except FileNotFoundError:
            raise _Gone from None

    def push(self, path: Path) -> None:
        """As of `Remote`."""
        self.push_file(path)
        self.push_file(note_path(path))

    def push_file(self, path: Path) -> None:
        """As of `Remote`."""
        try:
            with self._asking() as system:
                system.put_file(str(path), self._name(path))
        except FileNotFoundError as error:  # the bucket
            if not path.exists():
                raise
            raise self._failed(error) from None

    def remove(self, path: Path) -> None:
        """As of `Remote`."""
        with suppress(FileNotFoundError), self._asking() as system:
            system.rm_file(self._name(path))


class _Gone(Exception):
    """There is no such object at the remote."""


class _Torn(Exception):
    """The file of an artifact at the remote is not the one that its note describes."""
