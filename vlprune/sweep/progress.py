"""What a sweep shows while it runs: finished cells, finished rows, remaining time."""

from __future__ import annotations

import math
import time
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
from vlprune.store.lease import holder
from vlprune.store.record import ERROR, read_record, run_directory
from vlprune.sweep.engine import ELSEWHERE, Event
from vlprune.sweep.job import Job
from vlprune.sweep.plan import Plan
from vlprune.sweep.table import Cell


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
        pending: the cells of this sweep.
        results: the results directory.
        n_workers: number of worker processes.
        console: where to print.
    """

    def __init__(
        self,
        plan: Plan,
        pending: Collection[Cell],
        results: Path,
        n_workers: int,
        console: Console,
    ) -> None:
        self.table, self.results, self.n_workers, self.console = plan.table, results, n_workers, console
        self.headlines = plan.table.headlines
        self.cells = {key: cell for key, cell, _ in plan.places()}
        self.keys = {cell: key for key, cell in self.cells.items()}
        self.left = dict.fromkeys(pending)
        self.total = len(pending)
        self.running: dict[Job, float] = {}
        self.others = False
        self.durations: dict[tuple[str, str], list[float]] = {}
        self.began = time.monotonic()
        self.tasks = list(dict.fromkeys(cell.config.task.name for cell in plan.table.cells))
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
            self.running[job] = time.monotonic()
        elif event.kind == "warned":
            self._print(f"warning: {job}: {event.message}", style="yellow")
        elif event.kind == "waiting":
            self.running.pop(job, None)
            if not self.others:
                self._print(f"another sweep ({event.message}) is at work on {job}; what it makes is used here too")
            self.others = True
        elif event.kind == "retried":
            self.running.pop(job, None)
            self._print(f"{job}: {event.message}; it will run once more", style="yellow")
        else:
            self.running.pop(job, None)
            if event.kind == "failed":
                where = job.log.parent / ERROR if job.is_run else job.log
                self._print(f"failed: {job}: {event.message} ({self.results / where})", style="red")
            if job.is_run:
                cell = self.cells[job.name]
                del self.left[cell]
                if event.kind == "finished" and event.message != ELSEWHERE:
                    place = cell.config.model.name, cell.config.task.name
                    self.durations.setdefault(place, []).append(event.seconds)
                self._show_finished(event, cell)
        self.bar.update(self.meter, completed=self.total - len(self.left), description=self._times())

    def _working(self) -> list[str]:
        """A line for each running job: what it does, as its lease says; the times of the bar go on meanwhile."""
        self.bar.update(self.meter, description=self._times())
        lines = []
        for job, began in list(self.running.items()):
            sign = next(filter(None, (holder(self.results / file) for file in job.files)), None)
            doing = f"{sign.doing}, " if sign and sign.doing else ""
            lines.append(f"  {job}: {doing}{clock(time.monotonic() - began)}")
        return lines

    def _show_finished(self, event: Event, cell: Cell) -> None:
        if not self.console.is_terminal and event.kind == "finished":
            count = f"[{self.total - len(self.left)}/{self.total}]"
            self._print(f"{count} {cell}, {event.message or clock(event.seconds)}; {self._times()}")
        if all(other.row != cell.row for other in self.left):
            self._show_row(cell)

    def _show_row(self, last: Cell) -> None:
        values: dict[str, list[float]] = {task: [] for task in self.tasks}
        for cell in self.table.cells:
            if cell.row == last.row:
                record = read_record(run_directory(self.results, self.keys[cell]))
                if record is not None and record.metrics:
                    task = cell.config.task.name
                    values[task].append(record.metrics[self.headlines[task]])
        texts = [f"{sum(seeds) / len(seeds):.1f}" if seeds else MISSING for seeds in values.values()]
        pruning = last.config.pruning
        at = "" if pruning.method == DENSE else percent(pruning.sparsity)
        self._print(self._columns(last.config.model.name, last.label, at, texts), style="bold")

    def _columns(self, model: str, method: str, sparsity: str, cells: list[str]) -> str:
        models = max(len(cell.config.model.name) for cell in self.table.cells)
        methods = max(len(cell.label) for cell in self.table.cells)
        place = f"{model:<{max(5, models)}}  {method:<{max(6, methods)}}  {sparsity:>8}  "
        return place + "".join(f"{cell:>9}" for cell in cells)

    def _times(self) -> str:
        remaining = self._remaining()
        elapsed = clock(time.monotonic() - self.began)
        return f"elapsed {elapsed}, remaining {'?' if remaining is None else clock(remaining)}"

    def _remaining(self) -> float | None:
        # A cell takes as long as the finished ones of its model and task, or as all of them; workers share the rest.
        every = [seconds for durations in self.durations.values() for seconds in durations]
        if not every:
            return None
        now, left = time.monotonic(), 0.0
        began = {self.cells[job.name]: start for job, start in self.running.items() if job.is_run}
        for cell in self.left:
            similar = self.durations.get((cell.config.model.name, cell.config.task.name), every)
            left += max(sum(similar) / len(similar) - (now - began.get(cell, now)), 0.0)
        return left / self.n_workers

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
