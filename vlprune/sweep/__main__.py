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
from pathlib import Path
from typing import NoReturn

import tyro
from rich.console import Console

from vlprune.config import ConfigError, RunConfig
from vlprune.execution import Execution
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import terminal
from vlprune.reports.origins import mixture
from vlprune.reports.publish import publish
from vlprune.reports.tables import summary
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.tuned import settle
from vlprune.store.manifest import write_manifest
from vlprune.store.record import ERROR, predictions_path, run_directory
from vlprune.store.verify import verify
from vlprune.sweep.engine import Stopped, Work, cuda_devices, execute
from vlprune.sweep.options import Options, parse_shard, quickstart, settings_given
from vlprune.sweep.plan import Plan, plan
from vlprune.sweep.progress import Progress, clock
from vlprune.sweep.status import failed, status
from vlprune.sweep.table import Cell, load_table

STOPPED = 3
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def sweep(
    options: Options,
    work: Work,
    check: Callable[[Iterable[RunConfig]], list[str]],
    console: Console,
    devices: Sequence[str] = (),
) -> int:
    """Runs and prints a table; the exit code is 0, or 1 where a run failed, or STOPPED where the sweep could not go on.

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
    execution, shard = options.execution, parse_shard(options.shard)
    # Absolute, so that equal names in two places are not the same data.
    data = None if options.data is None else str(options.data.resolve())
    given, suffix = settings_given(options)
    table = load_table(options.table or quickstart(), given, data, options.limit)
    table = table.named(f"{table.name}{suffix}")
    planned = plan(table, Fingerprints(skip_broken=options.skip_broken))
    if options.status:
        for line in status(planned, options.results):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return 0
    records = planned.records(options.results)
    missing = {cell: None for cell in table.cells if records[cell] is None}
    pending = _chosen(planned, missing, shard, options)
    if options.dry_run:
        for cell in table.cells:
            word = "to run" if cell in pending else "      " if cell in missing else "done  "
            console.print(f"{word}  {cell}", highlight=False)
    some = f", {len(pending)} of the others to run" if len(pending) < len(missing) else ""
    done = len(table.cells) - len(missing)
    console.print(f"{table.name}: {len(table.cells)} runs, {done} done{some}", highlight=False)
    if options.dry_run:
        return 0

    left_out = check([cell.config for cell in pending]) if pending else []
    write_manifest(options.results, planned.manifest())
    n_workers = min(options.jobs or len(devices) or _cores(), max(len(pending), 1))
    errors, stopped = _run(planned, pending, work, execution, n_workers, console, devices)
    if options.keep_weights == "best":
        _keep_best(planned, options.results)
    try:
        _print_results(planned, options.results, console)
    except OSError as error:
        console.print(
            f"the table cannot be written: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        stopped = stopped or str(error)
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
    if stopped:
        text = f"stopped: {stopped}; what is done is stored, the same command goes on when that is mended"
        console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        return STOPPED
    return 1 if errors else 0


def _chosen(planned: Plan, missing: Collection[Cell], shard: tuple[int, int], options: Options) -> dict[Cell, None]:
    """Those of the missing cells that this command is asked to do."""
    part, parts = shard
    groups: dict[str, list[Cell]] = {}  # runs with one training are done by one
    for _, cell, own in planned.places():
        groups.setdefault(own.tuned.key, []).append(cell)
    own = {cell for number, group in enumerate(groups.values()) if number % parts == part for cell in group}
    keys = {cell: key for key, cell, _ in planned.places()}
    return {
        cell: None
        for cell in missing
        if cell in own and (not options.retry_failed or failed(options.results, keys[cell]))
    }


def _verify(results: Path, console: Console) -> int:
    """Prints what is wrong in a results directory; the exit code is 1 where anything is."""
    found = verify(results)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(found.intact.items())) or "no files"
    console.print(f"{results}: {counts} are as they were stored", highlight=False, markup=False, soft_wrap=True)
    for fault in found.faults:
        console.print(fault, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if found.faults else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(
    planned: Plan,
    pending: Collection[Cell],
    work: Work,
    execution: Execution,
    n_workers: int,
    console: Console,
    devices: Sequence[str],
) -> tuple[dict[Cell, str], str]:
    """{cell: why it failed}, and why the sweep stopped before its end, "" where it did not."""
    errors: dict[Cell, str] = {}
    done, stopped = 0, ""
    if not pending:
        return errors, stopped
    assert execution.store is not None
    began = time.monotonic()
    places = {key: (cell, own.tuned) for key, cell, own in planned.places() if cell in pending}
    waiting = Counter(tuned.key for _, tuned in places.values())
    try:
        with (
            Progress(planned, pending, execution.store, n_workers, console) as progress,
            closing(execute(planned.jobs(pending, execution.store), work, execution, n_workers, devices)) as events,
        ):
            for event in events:
                progress.show(event)
                if not event.job.is_run or event.kind not in ("failed", "finished"):
                    continue
                cell, tuned = places[event.job.name]
                waiting[tuned.key] -= 1
                if event.kind == "failed":
                    errors[cell] = event.message
                    continue
                done += 1
                if not waiting[tuned.key]:
                    settle(tuned, execution)
    except Stopped as stop:
        stopped = str(stop)
    console.print(f"{done} runs finished, {len(errors)} failed, in {clock(time.monotonic() - began)}", highlight=False)
    return errors, stopped


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
    if mixed := mixture(records):
        console.print(mixed, style="yellow", highlight=False, markup=False, soft_wrap=True)
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
        code = (
            _verify(options.results, console)
            if options.verify
            else sweep(options, work, check, console, cuda_devices())
        )
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
