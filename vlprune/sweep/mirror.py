"""What a sweep has in its results directory of what is at its remote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vlprune.execution import KeepWeights
from vlprune.store.artifacts import intact, note_path
from vlprune.store.per_image import per_image_path
from vlprune.store.record import ERROR, LOSSES, RECORD, Record, predictions_path, read_record, run_directory
from vlprune.store.remote import NOWHERE, Remote
from vlprune.store.weights import settle
from vlprune.sweep.plan import is_stored

AT_ONCE = 16  # files that are copied at once, as each takes its time to be found
T = TypeVar("T")


class Mirror:
    """A results directory and the remote that it is a mirror of; where there is none, nothing is copied.

    Args:
        results: the results directory.
        remote: the remote, which is asked at once what it has.

    Raises:
        RemoteError: the remote fails; so does every method.
    """

    def __init__(self, results: Path, remote: Remote) -> None:
        self.results, self.remote = results, remote
        listing = remote.listing()
        self._there = None if listing is None else {results / file for file in listing}

    def has(self, path: Path) -> bool:
        """Whether an artifact is at the remote, as far as is known here; False where there is no remote."""
        return self._there is not None and {path, note_path(path)} <= self._there

    def is_stored(self, path: Path) -> bool:
        """Whether an artifact is where all workers find it, as far as is known here."""
        return is_stored(path) if self._there is None else self.has(path)

    def fetch_runs(self, keys: Iterable[str]) -> None:
        """Copies the records of runs that the remote alone has, or else why they failed."""
        there = self._there or ()

        def fetch(key: str) -> None:
            directory = run_directory(self.results, key)
            if intact(directory / RECORD):
                return
            done = self.has(directory / RECORD) and self.remote.fetch(directory / RECORD)
            if done and self.has(images := per_image_path(self.results, key)):
                self.remote.fetch(images)
            if (beside := directory / (LOSSES if done else ERROR)) in there:
                self.remote.fetch_file(beside)

        if self._there is not None:
            _at_once(fetch, keys)

    def push_runs(self, keys: Iterable[str]) -> None:
        """Copies the records of runs that this machine alone has, with what it has of their masks and predictions."""

        def push(key: str) -> None:
            directory = run_directory(self.results, key)
            if self.has(directory / RECORD) or (record := read_record(directory)) is None:
                return
            self.push([*self._masks([record]), predictions_path(self.results, record)])
            self.push([per_image_path(self.results, key)])
            if (directory / LOSSES).is_file():
                self.remote.push_file(directory / LOSSES)
            self.push([directory / RECORD])

        if self._there is not None:
            _at_once(push, keys)

    def push(self, paths: Iterable[Path]) -> None:
        """Copies artifacts that this machine alone has."""
        if self._there is None:
            return
        for path in paths:
            if not self.has(path) and intact(path):
                self.remote.push(path)
                self._there |= {path, note_path(path)}

    def fetch_masks(self, records: Iterable[Record]) -> None:
        """Copies the masks of finished runs that the remote alone has; a table says how far they overlap."""
        _at_once(self.remote.fetch, [path for path in self._masks(records) if self.has(path) and not path.is_file()])

    def settle(self, paths: Iterable[Path], keep: KeepWeights | None) -> None:
        """Settles fine-tuned weights that an earlier sweep may have left, here and at the remote."""
        for path in paths:
            settle(path, keep, self.remote if self.has(path) else NOWHERE)

    def remove(self, path: Path) -> None:
        """Deletes fine-tuned weights, here and at the remote."""
        path.unlink(missing_ok=True)
        if self.has(path):
            self.remote.remove(path)

    def _masks(self, records: Iterable[Record]) -> list[Path]:
        keys = dict.fromkeys(record.stages["masks"] for record in records if "masks" in record.stages)
        return [self.results / "cache" / "masks" / f"{key}.safetensors" for key in keys]


def _at_once(copy: Callable[[T], object], these: Iterable[T]) -> None:
    """Copies several things at once; the first error is raised when all are over."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in threads.map(copy, these):
            pass
