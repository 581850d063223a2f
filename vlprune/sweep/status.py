"""What a sweep is at, as any process can see it in the results directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from vlprune.store.doing import clock
from vlprune.store.lease import STALE, Sign, holder
from vlprune.store.record import ERROR, run_directory
from vlprune.sweep.plan import Plan, Run


def failed(results: Path, key: str) -> bool:
    """Whether a run was tried and failed, and nobody has tried it again since with more success."""
    return (run_directory(results, key) / ERROR).is_file()


def status(planned: Plan, results: Path) -> list[str]:
    """Lines for a person: how many runs are done, who works on what, what failed and why.

    Args:
        planned: the table.
        results: the results directory.
    """
    done = planned.done(results)
    pending = [run for run in planned.runs if run.key not in done]
    busy = dict(_busy(planned, pending, results))
    broken = [run for run in pending if str(run) not in busy and failed(results, run.key)]
    runs = sum(str(run) in busy for run in pending)
    lines = [
        f"{planned.table.name}: {len(planned.runs)} runs, {len(done)} done, {runs} running, "
        f"{len(broken)} failed, {len(pending) - runs - len(broken)} to run"
    ]
    lines += [f"running  {name}: {describe(sign)}" for name, sign in busy.items()]
    for run in broken:
        path = run_directory(results, run.key) / ERROR
        lines.append(f"failed   {run}: {path.read_text(encoding='utf-8').partition(chr(10))[0]} ({path})")
    return lines


def _busy(planned: Plan, pending: list[Run], results: Path) -> Iterator[tuple[str, Sign]]:
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
