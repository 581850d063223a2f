"""`python -m vlprune.report`: a table of results from a results directory, without running anything."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlprune import escapes
from vlprune.config import DENSE, ConfigError, unknown
from vlprune.reports.load import per_image_of
from vlprune.reports.publish import render
from vlprune.store.manifest import Manifest, manifest_path, read_manifest
from vlprune.sweep.given import AXES, SELECTION, Given, limit_name, settings_given

logger = logging.getLogger(__name__)

# {axis of a table: the field of a place that says where on it that is}
FIELDS = {"models": "model", "methods": "method", "sparsities": "sparsity", "tasks": "task", "seeds": "seed"}


@dataclass(frozen=True)
class Options(Given):
    """Prints a table of results that was swept, from the records of its finished runs.

    What a sweep was asked for, a report can be asked for: `--limit` and `--set` name another table, the lists choose
    among the runs of a table. Lists are separated by commas.

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
        ConfigError: no sweep of that table, none of its runs is done, or what is asked for is not in it.
    """
    manifest = chosen(options)
    records = manifest.records(options.results)
    if not records:
        raise ConfigError(
            f"none of the {len(manifest.cells)} runs of {manifest.name} is done in {str(options.results)!r}"
        )
    if missing := len(manifest.cells) - len(records):
        logger.warning("%d of the %d runs of %s are not done", missing, len(manifest.cells), manifest.name)
    known = per_image_of(options.results, [record.key for record in records])
    return render(manifest, records, options.format, known)


def chosen(options: Options) -> Manifest:
    """The table that is asked for, or those of its places that are.

    A sweep of some methods or seeds has a manifest of its own beside that of the whole table; places are taken from
    both, and where they name different runs for one place, from the manifest that was written last.

    Raises:
        ConfigError: no sweep of that table, or a value of an axis that no place of it has.
    """
    values, suffix = settings_given(options)
    stem = Path(options.table).name.removesuffix(".toml") + limit_name(options.limit)
    names = dict.fromkeys((stem + suffix, stem + suffix.removeprefix(SELECTION)))
    there = [path for name in names if (path := manifest_path(options.results, name)).is_file()]
    if not there:
        return read_manifest(options.results, stem + suffix)
    found = [read_manifest(options.results, path.stem) for path in sorted(there, key=lambda path: path.stat().st_mtime)]
    places = {replace(place, key=""): place for manifest in found for place in manifest.cells}
    for axis, setting in AXES.items():
        if (asked := values.get(setting)) is None:
            continue
        own = dict.fromkeys(getattr(place, FIELDS[axis]) for place in places.values())
        if lacking := [value for value in asked if value not in own]:
            raise ConfigError(
                f"{' and '.join(path.stem for path in there)}: {unknown(FIELDS[axis], str(lacking[0]), map(str, own))}"
            )
        kept = {*asked, *({DENSE, 0.0} if axis in ("methods", "sparsities") else ())}
        places = {name: place for name, place in places.items() if getattr(place, FIELDS[axis]) in kept}
    headlines = {task: metric for manifest in found for task, metric in manifest.headlines.items()}
    defaults = {method: own for manifest in found for method, own in manifest.defaults.items()}
    return Manifest(stem + suffix, headlines, defaults, tuple(places.values()))


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
