"""What a sweep shows while it runs: finished cells, finished rows, remaining time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from vlprune.config import DENSE
from vlprune.reports.grid import MISSING
from vlprune.reports.tables import metric_name, percent
from vlprune.store.doing import clock
from vlprune.store.lease import holder
from vlprune.store.record import ERROR, headline, read_record, run_directory
from vlprune.sweep.engine import ELSEWHERE, Event
from vlprune.sweep.job import Job
from vlprune.sweep.plan import Plan, Run

Kind = tuple[str, str]  # (model, task), which runs take alike long for


class _Bar(Bar):
    """A bar with a line below it for each job that runs, looked up once a second.

    Args:
        working: returns the lines.
        columns: of the bar.
        console: where to draw.
        expand: whether to take the whole width.
        disable: whether to draw nothing.
    """

    def __init__(self, working: Callable[[], list[str]], *columns: ProgressColumn, **options: Any) -> None:
        self._look, self._lines, self._next = working, list[str](), math.inf
        super().__init__(*columns, **options)

    def start(self) -> None:
        """Begins to draw."""
        self._next = 0.0
        super().start()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the lines."""
        yield from super().get_renderables()
        if time.monotonic() >= self._next:
            self._lines, self._next = self._look(), time.monotonic() + 1.0
        for line in self._lines:
            yield Text(line, no_wrap=True, overflow="ellipsis", style="dim")


class Progress:
    """Shows the events of a sweep: a bar on a terminal, a line per finished cell elsewhere, and every finished row.

    Args:
        plan: the whole table with its keys.
        pending: the runs that this sweep does.
        results: the results directory.
        n_workers: number of worker processes.
        console: where to print.
    """

    def __init__(
        self,
        plan: Plan,
        pending: Collection[Run],
        results: Path,
        n_workers: int,
        console: Console,
    ) -> None:
        self.results, self.n_workers, self.console = results, n_workers, console
        self.headlines = plan.table.headlines
        self.runs = {run.key: run for run in pending}
        self.left = Counter(run.cell.row for run in pending)  # of each row
        self.rows: dict[tuple, list[Run]] = {}
        for run in plan.runs:
            self.rows.setdefault(run.cell.row, []).append(run)
        self.total, self.over = len(pending), 0
        self.running: dict[str, tuple[Job, float]] = {}
        self.others = False
        self.remaining = Remaining(_kind(run) for run in pending)
        self.began = time.monotonic()
        self.tasks = list(dict.fromkeys(run.cell.config.task.name for run in plan.runs))
        self.widths = (
            max(5, *(len(run.cell.config.model.name) for run in plan.runs)),
            max(6, *(len(run.cell.label) for run in plan.runs)),
        )
        self.bar = _Bar(
            self._working,
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.meter = self.bar.add_task("", total=self.total)

    def __enter__(self) -> Progress:
        self.bar.start()
        names = [metric_name(self.headlines[task]) for task in self.tasks]
        self._print(self._columns("model", "method", "sparsity", names), style="bold")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        """Shows one event."""
        job = event.job
        if event.kind == "started":
            self.running[job.name] = job, time.monotonic()
        elif event.kind == "warned":
            self._print(f"warning: {job}: {event.message}", style="yellow")
        elif event.kind == "waiting":
            self.running.pop(job.name, None)
            if not self.others:
                self._print(f"another sweep ({event.message}) is at work on {job}; what it makes is used here too")
            self.others = True
        elif event.kind == "retried":
            self.running.pop(job.name, None)
            self._print(f"{job}: {event.message}; it will run once more", style="yellow")
        elif event.kind == "lost":
            self.running.pop(job.name, None)
            self._print(f"{job}: {event.message}; it will run elsewhere", style="yellow")
        else:
            self.running.pop(job.name, None)
            if event.kind == "failed":
                where = job.log.parent / ERROR if job.is_run else job.log
                self._print(f"failed: {job}: {event.message} ({self.results / where})", style="red")
            if job.is_run:
                run = self.runs[job.name]
                self.over += 1
                self.left[run.cell.row] -= 1
                took = event.seconds if event.kind == "finished" and event.message != ELSEWHERE else None
                self.remaining.end(_kind(run), took)
                self._show_finished(event, run)
        self.bar.update(self.meter, completed=self.over, description=self._times())

    def _working(self) -> list[str]:
        """A line for each running job: what it does, as its lease says; the times of the bar go on meanwhile."""
        self.bar.update(self.meter, description=self._times())
        lines = []
        for job, began in list(self.running.values()):
            sign = next(filter(None, (holder(self.results / file) for file in job.files)), None)
            doing = f": {sign.doing}" if sign and sign.doing else ""
            lines.append(f"  {job}{doing} ({clock(time.monotonic() - began)})")
        return lines

    def _show_finished(self, event: Event, run: Run) -> None:
        if not self.console.is_terminal and event.kind == "finished":
            count = f"[{self.over}/{self.total}]"
            self._print(f"{count} {run}, {event.message or clock(event.seconds)}; {self._times()}")
        if not self.left[run.cell.row]:
            self._show_row(run)

    def _show_row(self, last: Run) -> None:
        values: dict[str, list[float]] = {task: [] for task in self.tasks}
        for run in self.rows[last.cell.row]:
            record = read_record(run_directory(self.results, run.key))
            if record is not None and record.metrics:
                task = run.cell.config.task.name
                values[task].append(record.metrics[headline(self.headlines[task], record.metrics)])
        texts = [f"{sum(seeds) / len(seeds):.1f}" if seeds else MISSING for seeds in values.values()]
        model, pruning = last.cell.config.model, last.cell.config.pruning
        at = "" if pruning.method == DENSE else percent(pruning.sparsity)
        self._print(self._columns(model.name, last.cell.label, at, texts), style="bold")

    def _columns(self, model: str, method: str, sparsity: str, cells: list[str]) -> str:
        models, methods = self.widths
        return f"{model:<{models}}  {method:<{methods}}  {sparsity:>8}  " + "".join(f"{cell:>9}" for cell in cells)

    def _times(self) -> str:
        began = [(_kind(self.runs[job.name]), start) for job, start in self.running.values() if job.is_run]
        remaining = self.remaining.seconds(began)
        elapsed = clock(time.monotonic() - self.began)
        return f"elapsed {elapsed}, remaining {'?' if remaining is None else clock(remaining / self.n_workers)}"

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Remaining:
    """The work that is left: a run takes as long as the finished ones of its kind, or as all of them.

    Args:
        kinds: of every run that is to be done.
    """

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self.left = Counter(kinds)
        self.done: Counter[Kind] = Counter()
        self.spent: dict[Kind, float] = {}

    def end(self, kind: Kind, seconds: float | None) -> None:
        """Notes that a run is over, and how long it took; None where that tells nothing of others."""
        self.left[kind] -= 1
        if seconds is not None:
            self.done[kind] += 1
            self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    def seconds(self, began: Iterable[tuple[Kind, float]]) -> float | None:
        """Seconds of one worker until all runs are over; None where no run has told how long one takes.

        Args:
            began: (kind, when it began on the monotonic clock) of the runs that are worked on.
        """
        if not self.done:
            return None
        every = sum(self.spent.values()) / self.done.total()
        mean = {kind: self.spent[kind] / self.done[kind] if self.done[kind] else every for kind in self.left}
        passed = [min(time.monotonic() - start, mean[kind]) for kind, start in began]
        return sum(number * mean[kind] for kind, number in self.left.items()) - sum(passed)


def _kind(run: Run) -> Kind:
    return run.cell.config.model.name, run.cell.config.task.name
