"""The files of a table of results."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from vlprune import escapes
from vlprune.reports import plots
from vlprune.reports.caption import described, explained
from vlprune.reports.frame import PER_IMAGE, RESULTS, floor_frame, frame
from vlprune.reports.grid import html_table, latex, markdown, paragraph
from vlprune.reports.load import per_image_of
from vlprune.reports.marks import leaders
from vlprune.reports.origins import mixture
from vlprune.reports.overlaps import heat_map, middle, overlap_frame
from vlprune.reports.tables import averages, details, shown_first, summary
from vlprune.store.atomic import atomic, write_text
from vlprune.store.manifest import Manifest
from vlprune.store.record import Record

logger = logging.getLogger(__name__)


def render(manifest: Manifest, records: Iterable[Record], form: str, known: Mapping[str, pd.DataFrame]) -> str:
    """The records of a table in a format: a grid of headline metrics per model, one of all metrics per task, what for.

    Args:
        manifest: the table.
        records: its finished runs.
        form: "markdown", "latex", "html", or "csv" for one row per mean.
        known: {run key: pseudo-values (images, metrics)}, as `per_image_of` returns them.

    Raises:
        ValueError: two runs in one place.
    """
    records = list(records)
    long, floors = frames(manifest, records)
    if form == "csv":
        return averages(long).to_csv(index=False, float_format="%.6g")
    marked = leaders(long, known)
    grids = [*summary(long, floors, manifest.headlines, marked), *details(long, floors, marked)]
    said = " ".join(notes(manifest, records, long, marked))
    if form == "latex":  # a table of a paper stands alone
        titled = (replace(grid, title=f"{grid.title}. {said}") for grid in grids)
        texts = [latex(grid, f"{manifest.name}-{number}") for number, grid in enumerate(titled, 1)]
    else:
        texts = [paragraph(said, form), *map({"markdown": markdown, "html": html_table}[form], grids)]
    return "\n\n".join(texts) + "\n"


def frames(manifest: Manifest, records: list[Record]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of a table and its floors, as `frame` and `floor_frame` return them."""
    long = frame(records, manifest.variants, manifest.defaults)
    return long, floor_frame(records, manifest.variants)


def notes(manifest: Manifest, records: Sequence[Record], long: pd.DataFrame, marked: Collection[tuple]) -> list[str]:
    """The sentences on a table: data and training, what bold means, missing runs, runs that were made differently."""
    said = [*described(records), explained(long, marked)]
    if missing := len(manifest.cells) - len(records):
        said.append(f"{missing} of {len(manifest.cells)} runs are not done.")
    return [sentence for sentence in (*said, mixture(records)) if sentence]


def publish(manifest: Manifest, records: Iterable[Record], *, results: Path) -> list[Path]:
    """Writes table, figures and the overlap of the masks under results/tables/ and returns the files.

    NAME.md with links to the figures, NAME.csv with the means, NAME_results.csv with the rows of `load_results`,
    NAME_images.parquet with the pseudo-values of the runs that have some, NAME_TASK.png, NAME_overlap.csv and .png.

    Args:
        manifest: the table.
        records: its finished runs.
        results: the results directory.

    Raises:
        ValueError: two runs in one place; nothing is written.
        OSError: a file cannot be written.
    """
    name, headlines, variants, defaults = manifest.name, manifest.headlines, manifest.variants, manifest.defaults
    records, directory = list(records), results / "tables"
    found = per_image_of(results, [record.key for record in records])
    texts = {form: render(manifest, records, form, found) for form in ("csv", "markdown")}
    long, floors = frames(manifest, records)
    figures = {f"{task} against sparsity": (task, directory / f"{name}_{task}.png") for task in long.task.unique()}
    written = [directory / f"{name}{end}" for end in (".md", ".csv", RESULTS)]
    write_text(written[1], texts["csv"])
    write_text(written[2], long.to_csv(index=False))
    if found:
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
