"""Reading ahead: threads make what will be asked for next; Pillow decodes without the interpreter's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar, overload

from datasets import Dataset

T = TypeVar("T")
ROWS = 64  # rows that are read ahead; tasks ask for as many at a time


def ahead(calls: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """What calls return, in their order.

    Args:
        calls: what is called.
        threads: number of calls that are made at a time before anybody asks for them; 0: each when it is asked for.
    """
    if not threads:
        yield from (call() for call in calls)
        return
    left = iter(calls)
    pool = ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(call) for call in islice(left, threads))
        while pending:
            value = pending.popleft().result()
            pending.extend(pool.submit(call) for call in islice(left, 1))
            yield value
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def read_ahead(rows: Dataset, threads: int) -> Iterator[Sequence[Mapping[str, Any]]]:
    """While inside, rows of which the next ones are read by so many threads, for whoever asks for them in order."""
    if not threads:
        yield rows  # pyright: ignore[reportReturnType]
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield _ReadAhead(rows, pool)
    finally:
        pool.shutdown(cancel_futures=True)


class _ReadAhead(Sequence[Mapping[str, Any]]):
    def __init__(self, rows: Dataset, pool: ThreadPoolExecutor) -> None:
        self._rows, self._pool = rows, pool
        self._reading: dict[int, Future[Mapping[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def select_columns(self, names: list[str]) -> Dataset:
        """The rows with these columns alone, as of `datasets.Dataset`."""
        return self._rows.select_columns(names)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        wanted = range(index, min(index + 1 + ROWS, len(self)))
        for row in self._reading.keys() - wanted:
            self._reading.pop(row).cancel()
        for row in wanted:
            if row not in self._reading:
                self._reading[row] = self._pool.submit(self._rows.__getitem__, row)
        return self._reading.pop(index).result() if wanted else self._rows[index]
