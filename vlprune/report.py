"""`python -m vlprune.report`: a table of results from a results directory, without running anything."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlprune import escapes
from vlprune.config import ConfigError
from vlprune.reports.load import per_image_of
from vlprune.reports.publish import render
from vlprune.store.manifest import read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Prints a table of results that was swept, from the records of its finished runs.

    Attributes:
        table: name of the table, or its TOML file, of which the name alone counts.
        format: how to print it.
        results: the results directory; nothing else is read.
    """

    table: Annotated[str, tyro.conf.Positional] = "quickstart"
    format: Literal["markdown", "latex", "html", "csv"] = "markdown"
    results: Path = Path("results")


def report(options: Options) -> str:
    """The table in the asked format.

    Raises:
        ConfigError: no sweep of that table, or none of its runs is done.
    """
    manifest = read_manifest(options.results, Path(options.table).name.removesuffix(".toml"))
    records = manifest.records(options.results)
    if not records:
        raise ConfigError(
            f"none of the {len(manifest.cells)} runs of {manifest.name} is done in {str(options.results)!r}"
        )
    if missing := len(manifest.cells) - len(records):
        logger.warning("%d of the %d runs of %s are not done", missing, len(manifest.cells), manifest.name)
    known = per_image_of(options.results, [record.key for record in records])
    return render(manifest, records, options.format, known)


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    options = tyro.cli(Options, prog="python -m vlprune.report")
    try:
        text = report(options)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {escapes.terminal(str(error))}")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
