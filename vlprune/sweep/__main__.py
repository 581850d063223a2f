"""`python -m vlprune.sweep`: runs what is not done of a table, and prints the table."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from vlprune.config import ConfigError, RunConfig
from vlprune.execution import Execution, KeepWeights, gibibytes
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import terminal
from vlprune.reports.publish import publish
from vlprune.reports.tables import summary
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.tuned import settle
from vlprune.store.manifest import write_manifest
from vlprune.store.record import ERROR, predictions_path, run_directory
from vlprune.sweep.engine import Work, cuda_devices, execute
from vlprune.sweep.plan import Plan, plan
from vlprune.sweep.progress import Progress, clock
from vlprune.sweep.settings import AXES, check_values, file_name, parse_set
from vlprune.sweep.table import Cell, load_table

QUICKSTART = Path("experiments") / "quickstart.toml"
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
T = TypeVar("T")


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
        set: settings as NAME=VALUE or NAME=VALUE,VALUE that win over the table, such as finetuning.lr=1e-4 or
            seed=0,1,2; several values multiply. May be given several times.
        limit: run the same on so many samples of each split, calibrated on about as many.
        skip_broken: leave out images that are missing or cannot be read, and list them at the end.
        jobs: worker processes; the number of CUDA devices, or of cores, where it is not given.
        loader_workers: processes of each worker that read the training images; they change no numbers.
        dry_run: only say what would run and what is done.
        results: the results directory.
        memory_limit: GiB of gradient rows (chita, chita++) that a worker keeps in memory; more go to disk.
        spill: directory for gradient rows on disk; the cache of the results where it is not given.
        keep_weights: which fine-tuned weights stay in the results directory: all, of the seeds of each row the best, or
            none; where it is not given, until the predictions made with them are stored.
        checkpoint_seconds: time between two checkpoints of fine-tuning, from which it goes on after a kill.
    """

    table: Annotated[Path | None, tyro.conf.Positional] = None
    data: Path | None = None
    models: str | None = None
    methods: str | None = None
    sparsities: str | None = None
    tasks: str | None = None
    seeds: str | None = None
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    limit: int | None = None
    skip_broken: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    jobs: int | None = None
    loader_workers: int = 0
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    results: Path = Path("results")
    memory_limit: float = Execution.memory_limit / 2**30
    spill: Path | None = None
    keep_weights: KeepWeights | None = None
    checkpoint_seconds: float = Execution.checkpoint_seconds

    @property
    def execution(self) -> Execution:
        """How and where the runs are made.

        Raises:
            ConfigError: a number that is not finite or below 0.
        """
        return Execution(
            store=self.results,
            workers=self.loader_workers,
            memory_limit=gibibytes(self.memory_limit, "--memory-limit"),
            spill=self.spill,
            skip_broken=self.skip_broken,
            keep_weights=self.keep_weights,
            checkpoint_seconds=self.checkpoint_seconds,
        )


def quickstart() -> Path:
    """The quickstart's TOML file: of the working directory, else of the clone that this package is in.

    Raises:
        ConfigError: it is in neither.
    """
    for root in (Path(), Path(__file__).resolve().parents[2]):
        if (root / QUICKSTART).is_file():
            return root / QUICKSTART
    raise ConfigError(f"there is no {QUICKSTART} here; run this in a clone of vlprune, or name a TABLE.toml")


def sweep(
    options: Options,
    work: Work,
    check: Callable[[Iterable[RunConfig]], list[str]],
    console: Console,
    devices: Sequence[str] = (),
) -> int:
    """Runs and prints a table; the exit code is 0, or 1 where a run failed.

    Args:
        options: the options of the command line.
        work: what a worker does with a job, importable by name.
        check: called with what will run, before it does; returns the images that are left out.
        console: where to print.
        devices: of `cuda_devices`; each worker sees one of them.

    Raises:
        ConfigError: the table or an option is wrong, or a model or data cannot be loaded; nothing ran.
        KeyboardInterrupt: Ctrl-C; the workers are gone, finished runs are stored.
    """
    for name, least in (("jobs", 1), ("limit", 1), ("loader_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.data is not None and not options.data.is_dir():
        raise ConfigError(f"--data must be a directory, there is no {str(options.data)!r}")
    execution = options.execution
    # Absolute, so that equal names in two places are not the same data.
    data = None if options.data is None else str(options.data.resolve())
    given, suffix = _given(options)
    table = load_table(options.table or quickstart(), given, data, options.limit)
    table = table.named(f"{table.name}{suffix}")
    planned = plan(table, Fingerprints(skip_broken=options.skip_broken))
    records = planned.records(options.results)
    pending = {cell: None for cell in table.cells if records[cell] is None}
    if options.dry_run:
        for cell in table.cells:
            console.print(f"{'to run' if records[cell] is None else 'done  '}  {cell}", highlight=False)
    console.print(f"{table.name}: {len(table.cells)} runs, {len(table.cells) - len(pending)} done", highlight=False)
    if options.dry_run:
        return 0

    left_out = check([cell.config for cell in pending]) if pending else []
    write_manifest(options.results, planned.manifest())
    n_workers = min(options.jobs or len(devices) or _cores(), max(len(pending), 1))
    errors = _run(planned, pending, work, execution, n_workers, console, devices)
    if options.keep_weights == "best":
        _keep_best(planned, options.results)
    _print_results(planned, options.results, console)
    if options.keep_weights == "all" and (gone := _without_weights(planned, options.results)):
        text = f"the fine-tuned weights of {gone} runs that were finished before are gone; they are not trained again"
        console.print(text, highlight=False)
    if left_out:
        console.print(f"left out {len(left_out)} images that cannot be read:", highlight=False)
        for image in left_out:
            console.print(f"  {image}", highlight=False, markup=False, soft_wrap=True)
    for key, cell, _ in planned.places():
        if cell in errors:
            where = run_directory(options.results, key) / ERROR
            text = f"failed: {cell}: {errors[cell]} ({where})"
            console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if errors else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _given(options: Options) -> tuple[dict[str, list[Any]], str]:
    """{setting: values} of the command line, and what the name of the table gets for them."""
    kinds: dict[str, Callable[[str], Any]] = {"sparsities": float, "seeds": int}
    asked = {axis: _split(getattr(options, axis), axis, kinds.get(axis, str)) for axis in AXES}
    axes = {AXES[axis]: values for axis, values in asked.items() if values is not None}
    settings = parse_set(options.set)
    if twice := sorted(axes.keys() & settings.keys()):
        raise ConfigError(f"{twice[0]} is given twice, by --set and by an option of its own")
    others = [text for text in options.set if text.partition("=")[0].strip() not in (*AXES.values(), "model")]
    narrows = "-selection" if axes or len(others) < len(options.set) else ""
    return {**axes, **settings}, narrows + file_name(others)


def _split(text: str | None, option: str, convert: Callable[[str], T]) -> list[T] | None:
    if text is None:
        return None
    try:
        values = [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--{option} must be numbers separated by commas, got {text!r}") from None
    if not values:
        raise ConfigError(f"--{option} names nothing, got {text!r}")
    check_values(option, values, f"--{option}")
    return values


def _run(
    planned: Plan,
    pending: Collection[Cell],
    work: Work,
    execution: Execution,
    n_workers: int,
    console: Console,
    devices: Sequence[str],
) -> dict[Cell, str]:
    errors: dict[Cell, str] = {}
    if not pending:
        return errors
    assert execution.store is not None
    began = time.monotonic()
    places = {key: (cell, own.tuned) for key, cell, own in planned.places() if cell in pending}
    waiting = Counter(tuned.key for _, tuned in places.values())
    with (
        Progress(planned, pending, execution.store, n_workers, console) as progress,
        closing(execute(planned.jobs(pending, execution.store), work, execution, n_workers, devices)) as events,
    ):
        for event in events:
            progress.show(event)
            if event.job.is_run and event.kind in ("failed", "finished"):
                cell, tuned = places[event.job.name]
                waiting[tuned.key] -= 1
                if event.kind == "failed":
                    errors[cell] = event.message
                elif not waiting[tuned.key]:
                    settle(tuned, execution)
    done = len(pending) - len(errors)
    console.print(f"{done} runs finished, {len(errors)} failed, in {clock(time.monotonic() - began)}", highlight=False)
    return errors


def _keep_best(planned: Plan, results: Path) -> None:
    """Deletes the fine-tuned weights of every run but the best seed of each row and task, by the headline metric."""
    headlines, best = planned.table.headlines, {}
    for cell, record in planned.records(results).items():
        if record is not None and record.metrics:
            value = record.metrics[headlines[cell.config.task.name]]
            best.setdefault((cell.row, cell.config.task.name), []).append((value, -cell.config.seed, cell))
    winners = {max(runs, key=lambda run: run[:2])[2] for runs in best.values()}
    # Several rows may be evaluations of the same weights.
    kept = {own.tuned.path(results) for _, cell, own in planned.places() if cell in winners}
    for path in {own.tuned.path(results) for own in planned.chains} - kept:
        path.unlink(missing_ok=True)


def _without_weights(planned: Plan, results: Path) -> int:
    """The number of finished runs whose fine-tuned weights are not there."""
    records = planned.records(results)
    return sum(records[cell] is not None and not own.tuned.path(results).exists() for _, cell, own in planned.places())


def _print_results(planned: Plan, results: Path, console: Console) -> None:
    table, manifest = planned.table, planned.manifest()
    for cell, record in planned.records(results).items():
        if record is not None and not record.metrics:
            path = predictions_path(results, record)
            console.print(f"not scored: {cell}: {path}", highlight=False, markup=False, soft_wrap=True)
    records = [record for record in manifest.records(results) if record.metrics]
    if not records:
        return
    variants, defaults = manifest.variants, manifest.defaults
    long, floors = frame(records, variants, defaults), floor_frame(records, variants)
    for grid in summary(long, floors, table.headlines):
        for part in terminal(grid, console):
            console.print()
            console.print(part)
    console.print()
    paths = publish(
        table.name,
        records,
        table.headlines,
        directory=results / "tables",
        cache=results / "cache",
        variants=variants,
        defaults=defaults,
    )
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a sweep as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    options = tyro.cli(Options, prog="python -m vlprune.sweep")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        from functools import partial

        from vlprune.sweep.preflight import preflight
        from vlprune.sweep.worker import work

        # A file or a pipe has no width; the tables set it.
        console = Console(width=None if sys.stdout.isatty() else 160)
        check = partial(preflight, skip_broken=options.skip_broken)
        code = sweep(options, work, check, console, cuda_devices())
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped; finished runs are kept, the same command goes on from here", file=sys.stderr)
        sys.exit(TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


if __name__ == "__main__":
    main()
