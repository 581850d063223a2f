"""A table of results as a TOML file: which cells it has, and the run behind each."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from vlprune.config import (
    DENSE,
    CalibrationConfig,
    ConfigError,
    FinetuningConfig,
    PruningConfig,
    RunConfig,
    TaskConfig,
    limited,
    unknown,
    variant,
)
from vlprune.reports.variants import label, labels
from vlprune.schema import build, typed
from vlprune.store.keys import Contents, run_key

AXES = ("models", "methods", "sparsities", "tasks", "seeds")
PARTS = {
    "calibration": CalibrationConfig,
    "pruning": PruningConfig,
    "finetuning": FinetuningConfig,
    "task": TaskConfig,
}
DATA = "{data}"  # in a table, the directory that --data gives
# What an axis of [[grid]] sets cannot be set in a part as well.
ON_AXES = {("pruning", "method"): "methods", ("pruning", "sparsity"): "sparsities", ("task", "name"): "tasks"}

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Catalogue:
    """What exists to choose from.

    Attributes:
        methods: {pruner: the statistics it wants of the calibration pass that a sweep shares}, without "dense".
        tasks: names of the tasks.
        headlines: {task name: the metric that tables show first}.
        contents: what a config only names; raises a ValueError for names of models and data that are not known.
        check: raises a ValueError for pruning settings that the method does not have.
    """

    methods: Mapping[str, frozenset[str]]
    tasks: Collection[str]
    headlines: Mapping[str, str]
    contents: Callable[[RunConfig], Contents]
    check: Callable[[PruningConfig], None]


@dataclass(frozen=True)
class Selection:
    """Axis values asked for on a command line; None leaves an axis as the file has it."""

    models: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    tasks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    @property
    def narrows(self) -> bool:
        """Whether anything was asked for."""
        return any(getattr(self, axis) is not None for axis in AXES)


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        config: of the run.
        contents: what the config only names.
        key: of its record.
        label: how the table calls its method, with the settings that tell its variants apart.
    """

    config: RunConfig
    contents: Contents
    key: str
    label: str

    @property
    def row(self) -> tuple[str, str, str, float]:
        """(model, method, variant, sparsity)."""
        pruning = self.config.pruning
        return self.config.model, pruning.method, variant(self.config), pruning.sparsity

    @property
    def place(self) -> tuple[str, str, str, float, str, int]:
        """(model, method, variant, sparsity, task, seed): where its numbers stand in the table."""
        return *self.row, self.config.task.name, self.config.seed

    def __str__(self) -> str:
        method, space, settings = self.label.partition(" ")
        at = "" if method == DENSE else f"@{100 * self.config.pruning.sparsity:g}%"
        return f"{self.config.model} {method}{at}{space}{settings} {self.config.task.name} seed {self.config.seed}"


@dataclass(frozen=True)
class Table:
    """A named set of cells, in the order of the file, each place once."""

    name: str
    cells: tuple[Cell, ...]


def load_table(
    path: Path,
    catalogue: Catalogue,
    selection: Selection | None = None,
    data: str | None = None,
    limit: int | None = None,
) -> Table:
    """The table that a TOML file describes.

    The file has `[base]` (nested tables calibration, pruning, finetuning, task: settings of every run), `[task.<name>]`
    (the same tables, for the runs of one task) and `[[grid]]` entries: lists models, methods, sparsities, tasks and
    seeds (default [0]) that multiply, and settings of that entry. Later ones win: base, task, grid. The dense run of
    every model, task and seed is always there, once. A method may be there in several variants of its calibration and
    pruning settings, each from an entry of its own.

    Args:
        path: the file.
        catalogue: what exists.
        selection: axis values to run instead of those of the file. An entry keeps those that it lists; a value that no
            entry lists joins all of them.
        data: data set or directory of the task, and of the calibration unless `[base]` names another. In the file,
            "{data}/coco" is a directory below it, and stays one.
        limit: runs the same on so many samples (see `config.limited`); the table is called so.

    Raises:
        ConfigError: an unknown key or name, a value out of range, or two different runs in one place.
    """
    document = _read(path)
    _check_keys(document, ("base", "task", "grid"), path.name)
    base = _settings(document.get("base", {}), f"{path.name}: [base]")
    if data is not None:
        task = base.setdefault("task", {})
        if DATA not in str(task.get("data")):
            task["data"] = data
        base.setdefault("calibration", {}).setdefault("data", data)
    by_task = {}
    for task, values in _table(document.get("task", {}), f"{path.name}: [task]").items():
        if task not in catalogue.tasks:
            raise ConfigError(f"{path.name}: [task.{task}]: {unknown('task', task, catalogue.tasks)}")
        by_task[task] = _settings(values, f"{path.name}: [task.{task}]")
    entries = document.get("grid", [])
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path.name}: a table needs at least one [[grid]] entry")

    places = [f"{path.name}: [[grid]] {number}" for number in range(1, len(entries) + 1)]
    axes = _select(
        [_axes(entry, where) for entry, where in zip(entries, places, strict=True)], selection or Selection()
    )
    for entry_axes in axes:
        _check_names(entry_axes, catalogue, path.name)
    cells: dict[tuple, Cell] = {}
    for entry, entry_axes, where in zip(entries, axes, places, strict=True):
        own = _settings({k: v for k, v in entry.items() if k not in AXES}, where)
        for config in _configs(entry_axes, base, by_task, own, where):
            config = _placed(config, data, where)
            config = config if limit is None else limited(config, limit)
            _check_pruning(config, catalogue, where)
            contents = _contents(config, catalogue, where)
            name = label(config.pruning.method, variant(config))
            cell = Cell(config, contents, run_key(config, contents), name)
            other = cells.setdefault(cell.place, cell)
            if other.key != cell.key:
                raise ConfigError(
                    f"{where}: two different runs of {cell}; {_difference(other.config, config)}. "
                    "A table compares methods under one set of settings: make it two tables"
                )
    if not cells:
        raise ConfigError(f"{path.name}: nothing is left to run with this selection")
    names = labels(cell.row[1:3] for cell in cells.values())
    name = path.stem if limit is None else f"{path.stem}-limit-{limit}"
    return Table(name, tuple(replace(cell, label=names[cell.row[1:3]]) for cell in cells.values()))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"there is no table {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the table {str(path)!r}: {error.strerror}") from None


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table, got {value!r}")
    return value


def _check_keys(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: {unknown('key', key, known)}")


def _settings(values: object, where: str) -> Settings:
    settings = _table(values, where)
    _check_keys(settings, tuple(PARTS), where)
    for part, cls in PARTS.items():
        inner = _table(settings.get(part, {}), f"{where}: {part}")
        for key in inner:
            if (part, key) in ON_AXES:
                raise ConfigError(f"{where}: {part}.{key} is set by the list {ON_AXES[part, key]!r} of [[grid]]")
        _check_keys(inner, [f.name for f in fields(cls) if (part, f.name) not in ON_AXES], f"{where}: {part}")
        # Ranges are checked where the parts are merged: one may depend on a setting of another part.
        typed(cls, inner, f"{where}: {part}")
    return {part: dict(inner) for part, inner in settings.items()}


def _axes(entry: object, where: str) -> dict[str, list]:
    values = _table(entry, where)
    _check_keys(values, (*AXES, *PARTS), where)
    axes = {"seeds": [0], **{axis: values[axis] for axis in AXES if axis in values}}
    for axis, listed in axes.items():
        if not isinstance(listed, list) or not listed or not all(isinstance(v, str | int | float) for v in listed):
            raise ConfigError(f"{where}: {axis} must be a list of at least one name or number, got {listed!r}")
    only_dense = axes.get("methods") == [DENSE]
    for axis in AXES:
        if axis not in axes and not (axis == "sparsities" and only_dense):
            raise ConfigError(f"{where}: the list {axis!r} is missing")
    return {axis: list(dict.fromkeys(axes.get(axis, []))) for axis in AXES}


def _select(axes: list[dict[str, list]], selection: Selection) -> list[dict[str, list]]:
    chosen = [dict(entry) for entry in axes]
    for axis in AXES:
        asked = getattr(selection, axis)
        if asked is not None:
            listed = {value for entry in axes for value in entry[axis]}
            for entry in chosen:
                entry[axis] = [value for value in asked if value in entry[axis] or value not in listed]
    return chosen


def _check_names(axes: Mapping[str, list], catalogue: Catalogue, where: str) -> None:
    for model in axes["models"]:
        if not isinstance(model, str):
            raise ConfigError(f"{where}: a model must be a name or a path, got {model!r}")
    for method in axes["methods"]:
        if method != DENSE and method not in catalogue.methods:
            raise ConfigError(f"{where}: {unknown('method', str(method), (DENSE, *catalogue.methods))}")
    for task in axes["tasks"]:
        if task not in catalogue.tasks:
            raise ConfigError(f"{where}: {unknown('task', str(task), catalogue.tasks)}")
    for sparsity in axes["sparsities"]:
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
            raise ConfigError(f"{where}: a sparsity must be a number in [0, 1), got {sparsity!r}")
    for seed in axes["seeds"]:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"{where}: a seed must be a whole number of at least 0, got {seed!r}")


def _check_pruning(config: RunConfig, catalogue: Catalogue, where: str) -> None:
    try:
        catalogue.check(config.pruning)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _contents(config: RunConfig, catalogue: Catalogue, where: str) -> Contents:
    try:
        return catalogue.contents(config)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{where}: the models and data of a run cannot be read: {error}") from error


def _placed(config: RunConfig, data: str | None, where: str) -> RunConfig:
    """The config with the data directory in the place of DATA."""
    placed = {}
    for part in ("calibration", "task"):
        settings = getattr(config, part)
        if DATA in settings.data and data is None:
            raise ConfigError(f"{where}: {part}.data is {settings.data!r}: give the directory with --data DIR")
        placed[part] = replace(settings, data=settings.data.replace(DATA, data or DATA))
    return replace(config, **placed)


def _configs(axes: Mapping[str, list], base: Settings, by_task: Mapping[str, Settings], own: Settings, where: str):
    pruned = [
        {"method": method, "sparsity": sparsity}
        for method, sparsity in product(axes["methods"], axes["sparsities"])
        if method != DENSE
    ]
    prunings = [{"method": DENSE}, *pruned]
    for model, pruning, seed, task in product(axes["models"], prunings, axes["seeds"], axes["tasks"]):
        merged: Settings = {part: {} for part in PARTS}
        for settings in (base, by_task.get(task, {}), own):
            for part, values in settings.items():
                merged[part].update(values)
        # The dense run has no pruning settings, so that it is the same one for all entries.
        merged["pruning"] = pruning if pruning["method"] == DENSE else {**merged["pruning"], **pruning}
        merged["task"]["name"] = task
        yield build(RunConfig, {"model": model, "seed": seed, **merged}, where)


def _difference(a: RunConfig, b: RunConfig) -> str:
    for part, cls in PARTS.items():
        for f in fields(cls):
            one, two = getattr(getattr(a, part), f.name), getattr(getattr(b, part), f.name)
            if one != two:
                return f"{part}.{f.name} is {one!r} in one and {two!r} in the other"
    return "their settings differ"
