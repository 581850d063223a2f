"""The files of a table of results."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from vlprune.reports import plots
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import html_table, latex, markdown
from vlprune.reports.overlaps import heat_map, middle, overlap_frame
from vlprune.reports.tables import averages, details, summary
from vlprune.store.atomic import write_text
from vlprune.store.record import Record

logger = logging.getLogger(__name__)


def render(records: Iterable[Record], headlines: Mapping[str, str], form: str) -> str:
    """The records of a table in a format: its headline grids, then all metrics; csv is one row per mean."""
    records = list(records)
    long, floors = frame(records), floor_frame(records)
    if form == "csv":
        return averages(long).to_csv(index=False, float_format="%.6g")
    grids = [*summary(long, floors, headlines), *details(long, floors)]
    draw = {"markdown": markdown, "latex": latex, "html": html_table}[form]
    return "\n\n".join(draw(grid) for grid in grids) + "\n"


def publish(
    name: str, records: Iterable[Record], headlines: Mapping[str, str], *, directory: Path, cache: Path
) -> list[Path]:
    """Writes the files of a table and returns them.

    `<name>.md`, `<name>.csv` and a figure `<name>_<task>.png` per task; where masks that can be compared are in the
    cache of the sweep, also `<name>_overlap.csv` and `<name>_overlap.png`.
    """
    records = list(records)
    long, floors = frame(records), floor_frame(records)
    overlaps = _overlaps(records, cache)
    figures = {f"{task} against sparsity": (task, directory / f"{name}_{task}.png") for task in long.task.unique()}
    written = [directory / f"{name}.md", directory / f"{name}.csv", *(path for _, path in figures.values())]
    write_text(written[1], render(records, headlines, "csv"))
    for task, path in figures.values():
        plots.save(plots.figure(long, floors, task, headlines[task]), path)
    pictures = {title: path.name for title, (_, path) in figures.items()}
    if len(overlaps):
        written += [directory / f"{name}_overlap.csv", directory / f"{name}_overlap.png"]
        write_text(written[-2], overlaps.to_csv(index=False, float_format="%.6g"))
        plots.save(heat_map(overlaps, middle(overlaps.sparsity)), written[-1])
        pictures["overlap of the masks"] = written[-1].name
    links = "\n\n".join(f"![{title}]({file})" for title, file in pictures.items())
    write_text(written[0], f"# {name}\n\n{render(records, headlines, 'markdown')}\n{links}\n")
    return written


def _overlaps(records: list[Record], cache: Path) -> pd.DataFrame:
    try:
        return overlap_frame(records, cache)
    except ValueError as error:
        logger.warning("the overlap of the masks is left out: %s", error)
        return pd.DataFrame()
