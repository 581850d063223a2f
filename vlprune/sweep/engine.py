"""Where runs execute: local worker processes that survive a killed worker and end with their parent."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlprune.config import DENSE, RunConfig
from vlprune.store.record import LOG, Record, read_record, run_directory, versions, write_error, write_record
from vlprune.sweep.table import Cell

if TYPE_CHECKING:
    from vlprune.pipeline import Outcome

Run = Callable[[RunConfig, Path], "Outcome"]

# One thread a worker: workers are the parallelism, and the numbers do not depend on how many there are.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEVICES = "CUDA_VISIBLE_DEVICES"
ATTEMPTS = 2


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell.

    Attributes:
        kind: "started", "finished", "failed", "retried" (its worker died, it will run once more) or "warned".
        cell: the cell.
        seconds: since it started.
        message: the error or the warning, one line.
    """

    kind: Literal["started", "finished", "failed", "retried", "warned"]
    cell: Cell
    seconds: float = 0.0
    message: str = ""


def schedule(cells: Collection[Cell]) -> list[Cell]:
    """The cells in the order that completes the first rows of a table early: dense rows, then row by row."""

    def rank(axis: Callable[[Cell], object]) -> dict[object, int]:
        return {value: i for i, value in enumerate(dict.fromkeys(axis(cell) for cell in cells))}

    axes = (
        lambda cell: cell.config.model,
        lambda cell: cell.label,
        lambda cell: cell.config.pruning.sparsity,
        lambda cell: cell.config.seed,
        lambda cell: cell.config.task.name,
    )
    ranks = [rank(axis) for axis in axes]
    return sorted(
        cells,
        key=lambda cell: (
            cell.config.pruning.method != DENSE,
            *(rank[axis(cell)] for axis, rank in zip(axes, ranks, strict=True)),
        ),
    )


def choose(pending: Sequence[Cell], last: Cell | None, running: Collection[Cell]) -> Cell:
    """The pending cell that a worker takes next.

    First what shares the masks of its last cell, then a dense run, then a model that no other worker is on (they would
    wait for the same statistics), then masks that no other worker is making. A worker's first cell is of a model that
    no other worker is on, if there is one.
    """

    def masks(cell: Cell) -> tuple:
        return *cell.row, cell.config.seed

    models = {cell.config.model for cell in running}
    busy = {masks(cell) for cell in running}
    return min(
        pending,
        key=lambda cell: (
            last is None or masks(cell) != masks(last),
            last is None and cell.config.model in models,
            cell.config.pruning.method != DENSE,
            cell.config.model in models,
            masks(cell) in busy,
        ),
    )


def cuda_devices() -> list[str]:
    """The visible CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    number, visible = torch.cuda.device_count(), os.environ.get(DEVICES)
    return (visible.split(",") if visible else [str(i) for i in range(number)])[:number]


def execute(
    cells: Collection[Cell], run: Run, results: Path, jobs: int, devices: Sequence[str] = ()
) -> Generator[Event, None, None]:
    """The events of running cells in worker processes, as they happen.

    A finished cell leaves its record, a failed one error.txt; neither stops the others. A worker that dies (killed, out
    of memory) costs its cell one of two attempts. Closing the generator, or Ctrl-C, stops the workers; only running
    cells are lost.

    Args:
        cells: what to run.
        run: (config, cache directory) -> Outcome, importable by name.
        results: the results directory.
        jobs: number of worker processes.
        devices: of `cuda_devices`; each worker sees one of them.
    """
    pending = schedule(cells)
    attempts: dict[str, int] = {}
    workers: list[_Worker] = []
    try:
        while pending or any(worker.cell for worker in workers):
            workers = [worker for worker in workers if worker.cell or worker.alive()]
            while pending and sum(worker.cell is not None for worker in workers) < jobs:
                worker = next((w for w in workers if w.cell is None), None)
                if worker is None:
                    number = min(set(range(jobs)) - {w.number for w in workers})
                    worker = _Worker(run, results, number, devices[number % len(devices)] if devices else None)
                    workers.append(worker)
                cell = choose(pending, worker.last, [w.cell for w in workers if w.cell])
                pending.remove(cell)
                attempts[cell.key] = attempts.get(cell.key, 0) + 1
                worker.start(cell)
                yield Event("started", cell)
            for worker in _ready([w for w in workers if w.cell]):
                event = worker.news()
                if event.kind == "retried":
                    workers.remove(worker)
                    if attempts[event.cell.key] < ATTEMPTS:
                        pending.append(event.cell)
                    else:
                        message = f"{event.message}, {ATTEMPTS} times; its output is in {LOG}"
                        event = replace(event, kind="failed", message=_store(message, event.cell, results))
                yield event
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.join()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    # A grandchild may keep the pipe of a dead worker open, so the process is looked at as well.
    readable = wait([worker.connection for worker in workers], timeout=1.0)
    return [worker for worker in workers if worker.connection in readable or not worker.alive()]


class _Worker:
    """A worker process and the cell it is on; of the workers alive, each has its own number."""

    def __init__(self, run: Run, results: Path, number: int, device: str | None) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could not have loaders of its own; it ends with its parent by itself.
        self.process = context.Process(target=_work, args=(theirs, run, results), daemon=False)
        with _child_environment({} if device is None else {DEVICES: device}):
            self.process.start()
        theirs.close()
        self.cell: Cell | None = None
        self.last: Cell | None = None
        self.began = 0.0

    def alive(self) -> bool:
        return self.process.is_alive()

    def start(self, cell: Cell) -> None:
        self.cell, self.began = cell, time.monotonic()
        with suppress(OSError):  # It died while idle; the next look at it says so.
            self.connection.send(cell)

    def news(self) -> Event:
        assert self.cell is not None
        cell, seconds = self.cell, time.monotonic() - self.began
        try:
            kind, message = self.connection.recv() if self.connection.poll() or self.alive() else ("died", "")
        except (EOFError, OSError):
            kind, message = "died", ""
        if kind == "warned":
            return Event("warned", cell, seconds, message)
        self.cell, self.last = None, cell
        if kind == "died":
            self.connection.close()
            self.join()
            return Event("retried", cell, seconds, _death(self.process.exitcode))
        return Event(kind, cell, seconds, message)

    def dismiss(self) -> None:
        self.connection.close()  # An idle worker reads the end of the pipe and returns.
        if self.cell is not None:
            self.process.terminate()

    def join(self) -> None:
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"the worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the worker ended with exit code {exitcode}"


@contextmanager
def _child_environment(device: Mapping[str, str]) -> Iterator[None]:
    # Libraries read the number of threads and the devices when they are imported, and a child inherits an ignored
    # Ctrl-C: the parent decides, and a child that is still importing does not print a traceback.
    own = {**dict.fromkeys(THREADS, "1"), **device}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(connection: Connection, run: Run, results: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger().addHandler(_ToParent(connection))
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(cell, run, results))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _ToParent(logging.Handler):
    """Sends warnings to the parent, which owns the terminal."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one message."""
        self.connection.send(("warned", " ".join(record.getMessage().split())))


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _attempt(cell: Cell, run: Run, results: Path) -> tuple[str, str]:
    directory = run_directory(results, cell.key)
    try:
        _redirect_output(directory / LOG)
        # Another sweep on the same results may have finished it meanwhile.
        if read_record(directory) is None:
            outcome = run(cell.config, results / "cache")
            record = Record(
                key=cell.key,
                config=cell.config,
                metrics=outcome.metrics,
                floors=outcome.floors,
                sparsity=outcome.sparsity,
                layer_sparsity=outcome.layer_sparsity,
                seconds=outcome.seconds,
                peak_memory=outcome.peak_memory,
                versions=versions(),
                contents=cell.contents,
            )
            write_record(directory, record, outcome.predictions)
    except Exception as error:
        # Whatever a run raises is the result of that run; the others go on.
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return "failed", _store(message, cell, results, traceback.format_exc())
    return "finished", ""


def _store(message: str, cell: Cell, results: Path, details: str = "") -> str:
    # The message, with a note where not even error.txt could be written.
    try:
        write_error(run_directory(results, cell.key), f"{message}\n\n{cell}\n{cell.config}\n\n{details}")
    except OSError as error:
        return f"{message} (and error.txt could not be written: {error})"
    return message
