"""What a sweep is at, as any process can see it in the results directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from vlprune.store.lease import STALE, Sign, holder
from vlprune.store.record import ERROR, run_directory
from vlprune.sweep.plan import Plan
from vlprune.sweep.progress import clock
from vlprune.sweep.table import Cell


def failed(results: Path, key: str) -> bool:
    """Whether a run was tried and failed, and nobody has tried it again since with more success."""
    return (run_directory(results, key) / ERROR).is_file()


def status(planned: Plan, results: Path) -> list[str]:
    """Lines for a person: how many runs are done, who works on what, what failed and why.

    Args:
        planned: the table.
        results: the results directory.
    """
    records = planned.records(results)
    pending = [cell for cell in planned.table.cells if records[cell] is None]
    busy = dict(_busy(planned, pending, results))
    keys = {cell: key for key, cell, _ in planned.places()}
    broken = [cell for cell in pending if str(cell) not in busy and failed(results, keys[cell])]
    runs = sum(str(cell) in busy for cell in pending)
    lines = [
        f"{planned.table.name}: {len(records)} runs, {len(records) - len(pending)} done, {runs} running, "
        f"{len(broken)} failed, {len(pending) - runs - len(broken)} to run"
    ]
    lines += [f"running  {name}: {describe(sign)}" for name, sign in busy.items()]
    for cell in broken:
        path = run_directory(results, keys[cell]) / ERROR
        lines.append(f"failed   {cell}: {path.read_text(encoding='utf-8').partition(chr(10))[0]} ({path})")
    return lines


def _busy(planned: Plan, pending: list[Cell], results: Path) -> Iterator[tuple[str, Sign]]:
    for job in planned.jobs(pending, results):
        sign = next(filter(None, (holder(results / file) for file in job.files)), None)
        if sign is not None:
            yield str(job), sign


def describe(sign: Sign) -> str:
    """What a holder does, since when, and where; with the age of its last word where that is old."""
    now = time.time()
    silent = now - sign.changed / 1e9
    last = f", last heard of {clock(silent)} ago" if silent > STALE else ""
    return f"{sign.doing or 'at work'} ({sign.holder}, {clock(now - sign.since)}{last})"
