"""`python -m vlprune.report`: a table of results from the records, without running anything."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlprune.config import ConfigError
from vlprune.reports.publish import render
from vlprune.store.record import read_record, run_directory
from vlprune.sweep.catalogue import catalogue, quickstart
from vlprune.sweep.table import Catalogue, load_table


@dataclass(frozen=True)
class Options:
    """Prints a table of results from the records of finished runs.

    Attributes:
        table: the table's TOML file; the quickstart where none is given.
        format: how to print it.
        results: the results directory.
        data: the data directory the sweep was given.
    """

    table: Annotated[Path | None, tyro.conf.Positional] = None
    format: Literal["markdown", "latex", "html", "csv"] = "markdown"
    results: Path = Path("results")
    data: Path | None = None


def report(options: Options, known: Catalogue) -> str:
    """The table in the asked format.

    Raises:
        ConfigError: the table is wrong, or none of its runs is done.
    """
    data = None if options.data is None else str(options.data.resolve())
    table = load_table(options.table or quickstart(), known, data=data)
    found = (read_record(run_directory(options.results, cell.key)) for cell in table.cells)
    records = [record for record in found if record is not None]
    if not records:
        raise ConfigError(f"none of the {len(table.cells)} runs of {table.name} is done in {str(options.results)!r}")
    return render(records, known.headlines, options.format)


def main() -> None:
    """Runs the command line."""
    options = tyro.cli(Options, prog="python -m vlprune.report")
    try:
        text = report(options, catalogue())
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
