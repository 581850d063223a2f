"""The files of a table of results."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from vlprune import escapes
from vlprune.reports import plots
from vlprune.reports.frame import PER_IMAGE, RESULTS, floor_frame, frame
from vlprune.reports.grid import html_table, latex, markdown, paragraph
from vlprune.reports.load import per_image_of
from vlprune.reports.origins import mixture
from vlprune.reports.overlaps import heat_map, middle, overlap_frame
from vlprune.reports.tables import averages, details, shown_first, summary
from vlprune.reports.variants import NO_DEFAULTS, Defaults
from vlprune.store.atomic import atomic, write_text
from vlprune.store.record import Record

logger = logging.getLogger(__name__)


def render(
    records: Iterable[Record],
    headlines: Mapping[str, str],
    form: str,
    variants: Mapping[str, str] | None = None,
    defaults: Defaults = NO_DEFAULTS,
) -> str:
    """The records of a table in a format: a grid of headline metrics per model, then one of all metrics per task.

    Args:
        records: finished runs.
        headlines: {task: metric}.
        form: "markdown", "latex", "html", or "csv" for one row per mean.
        variants: {record key: variant}, as `frame` takes them.
        defaults: {method: {option: default as text}}, as `frame` takes them.

    Raises:
        ValueError: two runs in one place.
    """
    records = list(records)
    long, floors = frame(records, variants, defaults), floor_frame(records, variants)
    if form == "csv":
        return averages(long).to_csv(index=False, float_format="%.6g")
    grids = [*summary(long, floors, headlines), *details(long, floors)]
    draw = {"markdown": markdown, "latex": latex, "html": html_table}[form]
    texts = [draw(grid) for grid in grids]
    if mixed := mixture(records):
        texts.append(paragraph(mixed, form))
    return "\n\n".join(texts) + "\n"


def publish(
    name: str,
    records: Iterable[Record],
    headlines: Mapping[str, str],
    *,
    results: Path,
    variants: Mapping[str, str] | None = None,
    defaults: Defaults = NO_DEFAULTS,
) -> list[Path]:
    """Writes the files of a table into `tables` of a results directory, and returns them.

    `<name>.md`, `<name>.csv` (means over seeds), `<name>_results.csv` (a row per run and metric, which `load_results`
    reads), where there are any `<name>_images.parquet` (pseudo-values, which `load_per_image` reads), and a figure
    `<name>_<task>.png` per task; where masks that can be compared are in the cache of the sweep, also
    `<name>_overlap.csv` and `<name>_overlap.png`.

    Args:
        name: name of the table.
        records: finished runs.
        headlines: {task: metric}.
        results: the results directory.
        variants: {record key: variant}, as `frame` takes them.
        defaults: {method: {option: default as text}}, as `frame` takes them.

    Raises:
        ValueError: two runs in one place; nothing is written.
        OSError: a file cannot be written.
    """
    records, directory = list(records), results / "tables"
    texts = {form: render(records, headlines, form, variants, defaults) for form in ("csv", "markdown")}
    long, floors = frame(records, variants, defaults), floor_frame(records, variants)
    figures = {f"{task} against sparsity": (task, directory / f"{name}_{task}.png") for task in long.task.unique()}
    written = [directory / f"{name}{end}" for end in (".md", ".csv", RESULTS)]
    write_text(written[1], texts["csv"])
    write_text(written[2], long.to_csv(index=False))
    if found := per_image_of(results, [record.key for record in records]):
        rows = pd.concat([own.reset_index().assign(key=key) for key, own in found.items()])
        written.append(directory / f"{name}{PER_IMAGE}")
        with atomic(written[-1]) as half:
            rows.astype({"key": "category", "image_id": "category"}).to_parquet(half, index=False, compression="zstd")
    written += [path for _, path in figures.values()]
    first = shown_first(long, headlines)
    for task, path in figures.values():
        plots.save(plots.figure(long, floors, task, first[task]), path)
    pictures = {title: path.name for title, (_, path) in figures.items()}
    overlaps = _overlaps(records, results / "cache", variants)
    if len(overlaps):
        written += [directory / f"{name}_overlap.csv", directory / f"{name}_overlap.png"]
        write_text(written[-2], overlaps.to_csv(index=False, float_format="%.6g"))
        plots.save(heat_map(overlaps, middle(overlaps.sparsity), defaults), written[-1])
        pictures["overlap of the masks"] = written[-1].name
    links = "\n\n".join(f"![{escapes.markdown(title)}]({quote(file)})" for title, file in pictures.items())
    write_text(written[0], f"# {escapes.markdown(name)}\n\n{texts['markdown']}\n{links}\n")
    return written


def _overlaps(records: list[Record], cache: Path, variants: Mapping[str, str] | None) -> pd.DataFrame:
    try:
        return overlap_frame(records, cache, variants)
    except (ValueError, ImportError) as error:
        logger.warning("the overlap of the masks is left out: %s", error)
        return pd.DataFrame()
