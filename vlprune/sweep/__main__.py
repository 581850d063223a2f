"""`python -m vlprune.sweep`: runs what is not done of a table, and prints the table."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import tyro
from rich.console import Console

from vlprune.calibrate.rows import MEMORY_LIMIT, Rows
from vlprune.config import DENSE, ConfigError, RunConfig
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import terminal
from vlprune.reports.publish import publish
from vlprune.reports.tables import summary
from vlprune.store.record import ERROR, PREDICTIONS, read_record, run_directory
from vlprune.sweep.catalogue import catalogue, quickstart
from vlprune.sweep.engine import Run, cuda_devices, execute
from vlprune.sweep.progress import Progress, clock
from vlprune.sweep.table import Catalogue, Cell, Selection, Table, load_table

if TYPE_CHECKING:
    from vlprune.pipeline import Outcome

T = TypeVar("T")


class RunOfSweep(Protocol):
    """vlprune.pipeline.run: one run, and the statistics that all methods of the sweep need."""

    def __call__(self, config: RunConfig, cache: Path, needs: frozenset[str]) -> Outcome:
        """The outcome of a config."""
        ...


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Options:
    """Runs what is not done yet of a table of results, and prints the table. Lists are separated by commas.

    Attributes:
        table: the table's TOML file; the quickstart where none is given.
        data: data directory, for tables on real data.
        models: models to run instead of those of the table.
        methods: methods to run; the dense model always runs.
        sparsities: pruned fractions, for example 0.63,0.75.
        tasks: tasks to run.
        seeds: seeds to run, for example 0,1,2.
        limit: run the same on so many samples of each split, calibrated on about as many.
        skip_broken: leave out images that are missing or cannot be read, and list them at the end.
        jobs: worker processes; the number of CUDA devices, or of cores, where it is not given.
        loader_workers: processes of each worker that read the training images; they change no numbers.
        dry_run: only say what would run and what is done.
        results: the results directory.
        memory_limit: GiB of gradient rows (chita, chita++) that a worker keeps in memory; more go to disk.
        spill: directory for gradient rows on disk; the cache of the results where it is not given.
    """

    table: Annotated[Path | None, tyro.conf.Positional] = None
    data: Path | None = None
    models: str | None = None
    methods: str | None = None
    sparsities: str | None = None
    tasks: str | None = None
    seeds: str | None = None
    limit: int | None = None
    skip_broken: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    jobs: int | None = None
    loader_workers: int = 0
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    results: Path = Path("results")
    memory_limit: float = MEMORY_LIMIT / 2**30
    spill: Path | None = None


def _split(text: str | None, option: str, convert: Callable[[str], T]) -> tuple[T, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(convert(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--{option} must be numbers separated by commas, got {text!r}") from None
    if not values:
        raise ConfigError(f"--{option} names nothing, got {text!r}")
    return values


def sweep(
    options: Options,
    known: Catalogue,
    run: RunOfSweep,
    check: Callable[[Iterable[RunConfig]], list[str]],
    console: Console,
    devices: Sequence[str] = (),
) -> int:
    """Runs and prints a table; the exit code is 0, or 1 where a run failed.

    One calibration pass per model and seed measures what all methods of the table need.

    Args:
        options: of the command line.
        known: what exists.
        run: vlprune.pipeline.run, importable by name.
        check: vlprune.preflight.preflight, called with what will run; returns the images that are left out.
        console: where to print.
        devices: of `cuda_devices`; each worker sees one of them.

    Raises:
        ConfigError: the table or an option is wrong, or a model or data cannot be loaded; nothing ran.
        KeyboardInterrupt: Ctrl-C; the workers are gone, finished runs are stored.
    """
    selection = Selection(
        models=_split(options.models, "models", str),
        methods=_split(options.methods, "methods", str),
        sparsities=_split(options.sparsities, "sparsities", float),
        tasks=_split(options.tasks, "tasks", str),
        seeds=_split(options.seeds, "seeds", int),
    )
    for name, least in (("jobs", 1), ("limit", 1), ("loader_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.data is not None and not options.data.is_dir():
        raise ConfigError(f"--data must be a directory, there is no {str(options.data)!r}")
    # Absolute, so that equal names in two places are not the same data.
    data = None if options.data is None else str(options.data.resolve())
    table = load_table(options.table or quickstart(), known, selection, data, options.limit)
    records = {cell.key: read_record(run_directory(options.results, cell.key)) for cell in table.cells}
    pending = [cell for cell in table.cells if records[cell.key] is None]
    if options.dry_run:
        for cell in table.cells:
            console.print(f"{'to run' if cell in pending else 'done  '}  {cell}", highlight=False)
    console.print(f"{table.name}: {len(table.cells)} runs, {len(table.cells) - len(pending)} done", highlight=False)
    if options.dry_run:
        return 0

    left_out = check([cell.config for cell in pending]) if pending else []
    jobs = min(options.jobs or len(devices) or _cores(), max(len(pending), 1))
    methods = {cell.config.pruning.method for cell in table.cells} - {DENSE}
    needs = frozenset().union(*(known.methods[method] for method in methods))
    with_needs = partial(run, needs=needs)
    errors = _run(table, pending, known, with_needs, options.results, jobs, console, devices)
    name = f"{table.name}-selection" if selection.narrows else table.name
    _print_results(name, table, known, options.results, console)
    if left_out:
        console.print(f"left out {len(left_out)} images that cannot be read:", highlight=False)
        for image in left_out:
            console.print(f"  {image}", highlight=False, markup=False, soft_wrap=True)
    for cell, message in errors.items():
        where = run_directory(options.results, cell.key) / ERROR
        text = f"failed: {cell}: {message} ({where})"
        console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if errors else 0


def _run(
    table: Table,
    pending: list[Cell],
    known: Catalogue,
    run: Run,
    results: Path,
    jobs: int,
    console: Console,
    devices: Sequence[str],
) -> dict[Cell, str]:
    errors: dict[Cell, str] = {}
    if not pending:
        return errors
    began = time.monotonic()
    with (
        Progress(table, pending, known.headlines, results, jobs, console) as progress,
        closing(execute(pending, run, results, jobs, devices)) as events,
    ):
        for event in events:
            progress.show(event)
            if event.kind == "failed":
                errors[event.cell] = event.message
    done = len(pending) - len(errors)
    console.print(f"{done} runs finished, {len(errors)} failed, in {clock(time.monotonic() - began)}", highlight=False)
    return errors


def _print_results(name: str, table: Table, known: Catalogue, results: Path, console: Console) -> None:
    found = {cell: read_record(run_directory(results, cell.key)) for cell in table.cells}
    for cell, record in found.items():
        if record is not None and not record.metrics:
            path = run_directory(results, cell.key) / PREDICTIONS
            console.print(f"not scored: {cell}: {path}", highlight=False, markup=False, soft_wrap=True)
    records = [record for record in found.values() if record is not None and record.metrics]
    if not records:
        return
    for grid in summary(frame(records), floor_frame(records), known.headlines):
        for part in terminal(grid, console):
            console.print()
            console.print(part)
    console.print()
    for path in publish(name, records, known.headlines, directory=results / "tables", cache=results / "cache"):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    options = tyro.cli(Options, prog="python -m vlprune.sweep")
    try:
        from vlprune.pipeline import run
        from vlprune.sweep.preflight import preflight

        skip = {"skip_broken": options.skip_broken}
        if options.memory_limit < 0:
            raise ConfigError(f"--memory-limit must be at least 0, got {options.memory_limit:g}")
        rows = partial(Rows, options.spill or options.results / "cache", round(options.memory_limit * 2**30))
        # A file or a pipe has no width; the tables set it.
        console = Console(width=None if sys.stdout.isatty() else 160)
        own = partial(run, new_rows=rows, workers=options.loader_workers, **skip)
        code = sweep(options, catalogue(), own, partial(preflight, **skip), console, cuda_devices())
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; finished runs are kept, the same command goes on from here")
    sys.exit(code)


if __name__ == "__main__":
    main()
