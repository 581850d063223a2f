"""The files of a table of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vlprune.atomic import write_text
from vlprune.record import Record
from vlprune.reports import plots
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import html_table, latex, markdown
from vlprune.reports.tables import averages, details, summary


def render(records: Iterable[Record], headlines: Mapping[str, str], form: str) -> str:
    """The records of a table in a format: its headline grids, then all metrics; csv is one row per mean."""
    records = list(records)
    long, floors = frame(records), floor_frame(records)
    if form == "csv":
        return averages(long).to_csv(index=False, float_format="%.6g")
    grids = [*summary(long, floors, headlines), *details(long, floors)]
    draw = {"markdown": markdown, "latex": latex, "html": html_table}[form]
    return "\n\n".join(draw(grid) for grid in grids) + "\n"


def publish(name: str, records: Iterable[Record], headlines: Mapping[str, str], directory: Path) -> list[Path]:
    """Writes `<name>.md`, `<name>.csv` and a figure `<name>_<task>.png` per task; returns the files."""
    records = list(records)
    long, floors = frame(records), floor_frame(records)
    files = [directory / f"{name}.md", directory / f"{name}.csv"]
    figures = {task: directory / f"{name}_{task}.png" for task in long.task.unique()}
    pictures = "\n\n".join(f"![{task} against sparsity]({path.name})" for task, path in figures.items())
    write_text(files[0], f"# {name}\n\n{render(records, headlines, 'markdown')}\n{pictures}\n")
    write_text(files[1], render(records, headlines, "csv"))
    for task, path in figures.items():
        plots.save(plots.figure(long, floors, task, headlines[task]), path)
    return [*files, *figures.values()]
