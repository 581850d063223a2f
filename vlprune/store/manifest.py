"""Manifest: which record stands at which place of a table, so that a report needs the results directory alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from vlprune.config import DENSE, ConfigError, validated
from vlprune.store.atomic import write_text
from vlprune.store.once import once
from vlprune.store.record import Record, read_record, run_directory

# What many records have alike.
SHARED = ("metrics", "floors", "origins", "seconds", "modality_sparsity", "evaluated")


@validated
class Place:
    """A place of a table and the run that stands there.

    Attributes:
        model: name of the pretrained model.
        method: name of the pruning method, or "dense".
        variant: settings that tell the runs of one method apart, as in "alignment=4 lam=0.1"; mostly empty.
        sparsity: pruned fraction that was asked for, in [0, 1).
        task: name of the task.
        seed: seed of the run.
        key: key of the run's record.
    """

    model: str
    method: str
    variant: str
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    task: str
    seed: Annotated[int, Field(ge=0)]
    key: str

    def __str__(self) -> str:
        at = "" if self.method == DENSE else f"@{100 * self.sparsity:g}%"
        settings = f" {self.variant}" if self.variant else ""
        return f"{self.model} {self.method}{at}{settings} {self.task} seed {self.seed}"


@validated
class Manifest:
    """A table of results: its name, its places in order, and the metric that it shows first of each task.

    Attributes:
        name: name of the table, which its files are called by.
        headlines: {task: metric}.
        defaults: {method: {option: default}}, in words, which tables show beside variants that differ from them.
        cells: the places.
    """

    name: str
    headlines: dict[str, str]
    defaults: dict[str, dict[str, str]]
    cells: tuple[Place, ...]

    def __post_init__(self) -> None:
        if missing := {cell.task for cell in self.cells} - self.headlines.keys():
            raise ConfigError(f"no headline of {', '.join(sorted(missing))}")
        if len({replace(cell, key="") for cell in self.cells}) < len(self.cells):
            raise ConfigError("two runs in one place")

    def runs(self, results: Path) -> Iterator[Record]:
        """The finished runs of the table, in its order, with the names that the table has for their models."""
        for cell in self.cells:
            record = read_record(run_directory(results, cell.key))
            if record is not None:
                model = replace(record.config.model, name=cell.model)
                yield replace(record, config=replace(record.config, model=model))

    def records(self, results: Path) -> list[Record]:
        """The finished runs as `runs` yields them, without their layers and with equal parts held once.

        A table may have ten thousand runs, and shows no layers. Nobody may change a part.
        """
        found, held = [], dict[Any, Any]()
        for record in self.runs(results):
            config = replace(record.config, model=once(record.config.model, held))
            own = {name: once(getattr(record, name), held) for name in SHARED}
            found.append(replace(record, config=config, layers={}, **own))
        return found

    @property
    def variants(self) -> dict[str, str]:
        """{record key: variant}."""
        return {cell.key: cell.variant for cell in self.cells}


def manifest_path(results: Path, name: str) -> Path:
    """Where the manifest of a table is."""
    return results / "manifests" / f"{name}.json"


def write_manifest(results: Path, manifest: Manifest) -> Path:
    """Stores a manifest and returns its file."""
    path = manifest_path(results, manifest.name)
    write_text(path, json.dumps(asdict(manifest), indent=1) + "\n")
    return path


def read_manifest(results: Path, name: str) -> Manifest:
    """The manifest of a table.

    Raises:
        ConfigError: no table of that name was swept into the results directory, or its manifest is damaged.
    """
    path = manifest_path(results, name)
    try:
        return parse_manifest(path.read_bytes(), path)
    except FileNotFoundError:
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.json"))) or "none"
        raise ConfigError(f"no sweep of table {name!r} in {str(results)!r}. There are: {known}") from None


def parse_manifest(text: str | bytes, path: Path) -> Manifest:
    """The manifest that JSON says.

    Raises:
        ConfigError: it says none; the message names the file that it came from.
    """
    try:
        return TypeAdapter(Manifest).validate_json(text, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{path} is no manifest of a table: {place}{': ' if place else ''}{fault['msg']}") from None
