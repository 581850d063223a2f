"""A sweep from its options to its printed table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from vlprune.config import ConfigError
from vlprune.execution import Execution
from vlprune.reports.caption import described, explained
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import terminal
from vlprune.reports.load import per_image_of
from vlprune.reports.marks import leaders
from vlprune.reports.origins import mixture
from vlprune.reports.tables import summary
from vlprune.store.doing import clock
from vlprune.store.lease import clear
from vlprune.store.manifest import Manifest, manifest_path, write_manifest
from vlprune.store.record import ERROR, RECORD, Record, headline, predictions_path, run_directory
from vlprune.store.remote import RemoteError, remote_of
from vlprune.store.verify import verify
from vlprune.store.weights import settle, weights_path
from vlprune.sweep.engine import Planner, Pool, Stopped, execute
from vlprune.sweep.mirror import Mirror
from vlprune.sweep.options import Options, parse_shard
from vlprune.sweep.plan import Plan, Run
from vlprune.sweep.progress import Progress
from vlprune.sweep.recall import look, recall, remember
from vlprune.sweep.status import failed, status

STOPPED = 3


# (options, how and where, planner, the most workers that can be of use) -> the workers.
NewPool = Callable[[Options, Execution, Planner, int], Pool]


def sweep(options: Options, planner: Planner, new_pool: NewPool, console: Console) -> int:
    """Runs and prints a table; the exit code is 0, or 1 where a run failed, or STOPPED where the sweep could not go on.

    Args:
        options: the options of the command line.
        planner: is asked unless the same table was planned before and is done, and nothing has changed since.
        new_pool: makes the workers.
        console: where to print.

    Raises:
        ConfigError: the table or an option is wrong, or a model or data cannot be loaded; nothing ran.
        RemoteError: the remote fails before anything ran.
        KeyboardInterrupt: Ctrl-C; the workers are gone, finished runs are stored.
    """
    _check(options)
    execution, shard = options.execution, parse_shard(options.shard)
    remote = remote_of(execution)
    if not (options.status or options.dry_run):
        remote.check()
    mirror, own = Mirror(options.results, remote), look(options)
    if not (options.status or options.dry_run or options.keep_weights) and (known := recall(options, own)):
        mirror.fetch_runs(known.variants.keys())
        records = known.records(options.results)
        if len(records) == len(known.cells):
            mirror.push_runs(known.variants.keys())
            mirror.settle((weights_path(options.results, record) for record in records), None)
            _clear(options.results, known.variants)
            _say(console, f"{known.name}: {len(records)} runs, {len(records)} done")
            return _ended(_print_results(known, records, mirror, console), console)
    planned, files = planner.plan(options)
    mirror.fetch_runs(planned.by_key)
    if options.status:
        for line in status(planned, options.results):
            _say(console, line)
        return 0
    done = planned.done(options.results)
    missing = [run for run in planned.runs if run.key not in done]
    pending = _chosen(planned, missing, shard, options)
    if options.dry_run:
        words = {**dict.fromkeys(done, "done  "), **{run.key: "to run" for run in pending}}
        for run in planned.runs:
            _say(console, f"{words.get(run.key, '      ')}  {run}")
    some = f", {len(pending)} of the others to run" if len(pending) < len(missing) else ""
    _say(console, f"{planned.table.name}: {len(planned.runs)} runs, {len(done)} done{some}")
    if options.dry_run:
        return 0

    # A sweep that was killed may have left weights that nothing waits for any more.
    awaited = {run.tuned.file for run in missing}
    left = {run.tuned.file for run in planned.runs} - awaited
    mirror.settle((options.results / file for file in left), execution.keep_weights)
    _clear(options.results, done)
    left_out = planner.check([run.cell.config for run in pending], skip_broken=options.skip_broken) if pending else []
    manifest = planned.manifest()
    write_manifest(options.results, manifest)
    remember(options, own, files, manifest)
    mirror.push_runs(planned.by_key)
    mirror.push(options.results / artifact.file for run in pending for artifact in run.artifacts)
    errors, stopped = _run(planned, pending, options, planner, new_pool, mirror, console) if pending else ({}, "")
    try:
        mirror = Mirror(options.results, remote)
        mirror.fetch_runs(planned.by_key)  # what others have done meanwhile
        mirror.push_runs(planned.by_key)  # what a sweep without the remote has done here
        records = manifest.records(options.results)
        if options.keep_weights == "best":
            _keep_best(planned, records, mirror)
    except RemoteError as error:
        stopped, records = stopped or str(error), manifest.records(options.results)
    fault = _print_results(manifest, records, mirror, console)
    if options.keep_weights == "all" and (gone := _without_weights(planned, records, mirror)):
        _say(
            console,
            f"the fine-tuned weights of {gone} runs that were finished before are gone; they are not trained again",
        )
    if left_out:
        _say(console, f"left out {len(left_out)} images that cannot be read:")
        for image in left_out:
            _say(console, f"  {image}")
    for run in planned.runs:
        if run.key in errors:
            where = run_directory(options.results, run.key) / ERROR
            _say(console, f"failed: {run}: {errors[run.key]} ({where})", style="red")
    return _ended(stopped or fault, console) or (1 if errors else 0)


def verified(execution: Execution, console: Console) -> int:
    """Prints what is wrong in a results directory; the exit code is 1 where anything is."""
    results = execution.store
    assert results is not None
    found = verify(results, remote_of(execution).listing() or ())
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(found.intact.items())) or "no files"
    _say(console, f"{results}: {counts} are as they were stored")
    for fault in found.faults:
        _say(console, fault, style="red")
    return 1 if found.faults else 0


def _clear(results: Path, keys: Iterable[str]) -> None:
    """Deletes the leases of finished runs that workers have left that were killed."""
    for key in keys:
        clear(run_directory(results, key) / RECORD)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _ended(stopped: str, console: Console) -> int:
    """STOPPED, said with its reason, where there is one; else 0."""
    if not stopped:
        return 0
    text = f"stopped: {stopped}; what is done is stored, the same command goes on when that is mended"
    _say(console, text, style="red")
    return STOPPED


def _check(options: Options) -> None:
    for name, least in (("jobs", 1), ("limit", 1), ("loader_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.data is not None and not options.data.is_dir():
        raise ConfigError(f"--data must be a directory, there is no {str(options.data)!r}")


def _chosen(planned: Plan, missing: Collection[Run], shard: tuple[int, int], options: Options) -> list[Run]:
    """Those of the missing runs that this command is asked to do."""
    part, parts = shard
    groups: dict[str, list[Run]] = {}  # runs with one training are done by one
    for run in planned.runs:
        groups.setdefault(run.tuned.key, []).append(run)
    own = {run for number, group in enumerate(groups.values()) if number % parts == part for run in group}
    return [run for run in missing if run in own and (not options.retry_failed or failed(options.results, run.key))]


def _run(
    planned: Plan,
    pending: Collection[Run],
    options: Options,
    planner: Planner,
    new_pool: NewPool,
    mirror: Mirror,
    console: Console,
) -> tuple[dict[str, str], str]:
    """{key: why the run failed}, and why the sweep stopped before its end, "" where it did not."""
    execution = options.execution
    pool = new_pool(options, execution, planner, len(pending))
    errors: dict[str, str] = {}
    done, stopped = 0, ""
    began = time.monotonic()
    waiting = Counter(run.tuned.key for run in pending)
    jobs = planned.jobs(pending, options.results, mirror.is_stored)
    try:
        with (
            Progress(planned, pending, options.results, pool.n_workers, console) as progress,
            closing(execute(jobs, pool, execution)) as events,
        ):
            for event in events:
                progress.show(event)
                if not event.job.is_run or event.kind not in ("failed", "finished"):
                    continue
                run = planned.by_key[event.job.name]
                waiting[run.tuned.key] -= 1
                if event.kind == "failed":
                    errors[run.key] = event.message
                    continue
                done += 1
                if not waiting[run.tuned.key]:
                    settle(options.results / run.tuned.file, execution.keep_weights, mirror.remote)
    except (Stopped, RemoteError) as stop:
        stopped = str(stop)
    _say(console, f"{done} runs finished, {len(errors)} failed, in {clock(time.monotonic() - began)}")
    return errors, stopped


def _keep_best(planned: Plan, records: Iterable[Record], mirror: Mirror) -> None:
    """Deletes the fine-tuned weights of every run but the best seed of each row and task, by the headline metric."""
    best: dict[tuple, tuple[float, int, Run]] = {}
    for record in records:
        if record.metrics:
            run = planned.by_key[record.key]
            config = run.cell.config
            metric = headline(planned.table.headlines[config.task.name], record.metrics)
            found = record.metrics[metric], -config.seed, run
            place = *run.cell.row, config.task.name
            if place not in best or found[:2] > best[place][:2]:
                best[place] = found
    # Several rows may be evaluations of the same weights.
    kept = {run.tuned.file for _, _, run in best.values()}
    for file in {run.tuned.file for run in planned.runs} - kept:
        mirror.remove(mirror.results / file)


def _without_weights(planned: Plan, records: Iterable[Record], mirror: Mirror) -> int:
    """The number of finished runs whose fine-tuned weights are not there."""
    paths = (mirror.results / planned.by_key[record.key].tuned.file for record in records)
    return sum(not path.exists() and not mirror.has(path) for path in paths)


def _print_results(manifest: Manifest, records: Sequence[Record], mirror: Mirror, console: Console) -> str:
    """Prints and stores the table of the finished runs; why it could not be stored, "" where it could."""
    results, scored = mirror.results, [record for record in records if record.metrics]
    places = {place.key: place for place in manifest.cells}
    for record in records:
        if not record.metrics:
            _say(console, f"not scored: {places[record.key]}: {predictions_path(results, record)}")
    if not scored:
        return ""
    long, floors = frame(scored, manifest.variants, manifest.defaults), floor_frame(scored, manifest.variants)
    marked = leaders(long, per_image_of(results, [record.key for record in scored]))
    for grid in summary(long, floors, manifest.headlines, marked):
        for part in terminal(grid, console):
            console.print()
            console.print(part)
    console.print()
    for sentence in (*described(scored), explained(long, marked)):
        _say(console, sentence)
    if mixed := mixture(scored):
        _say(console, mixed, style="yellow")
    from vlprune.reports.publish import publish  # its figures take seconds to import, which nobody need wait for

    try:
        mirror.fetch_masks(scored)
        paths = publish(manifest, scored, results=results)
        for path in (*paths, manifest_path(results, manifest.name)):
            mirror.remote.push_file(path)
    except OSError as error:
        _say(console, f"the table cannot be written: {error}", style="red")
        return str(error)
    for path in paths:
        _say(console, f"wrote {path}")
    return ""
