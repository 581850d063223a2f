"""A table of results as a TOML file: which cells it has, and the run behind each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from eval import TASKS
from eval.options import NoOptions
from vlprune.config import (
    DENSE,
    PARTS,
    CalibrationConfig,
    ConfigError,
    Options,
    RunConfig,
    build,
    changed,
    unknown,
)
from vlprune.models import family_of
from vlprune.pruners import PRUNERS, check_pruning, get_pruner
from vlprune.reports.variants import label, labels, setting, variant
from vlprune.stages.masks import settings_read
from vlprune.store.once import once
from vlprune.sweep.cells import Cell, Table
from vlprune.sweep.given import AXES, PLACE, check_values, limit_name
from vlprune.sweep.settings import Settings, axes_of, check_axes, check_keys, flat, is_axis, nested, of_each, read_toml

DATA = "{data}"  # in a table, the directory that --data gives


def load_table(
    path: Path,
    given: Mapping[str, Sequence[Any]] | None = None,
    data: str | None = None,
    limit: int | None = None,
) -> Table:
    """The table that a TOML file describes.

    The file has `[base]` (nested tables model, calibration, pruning, finetuning, task: settings of every run),
    `[task.NAME]` and `[method.NAME]` (the same tables, for the runs of one task or method) and `[[grid]]` entries: the
    lists models, methods, sparsities, tasks and seeds (default [0]) multiply, and so does any other setting that is a
    list there, such as `finetuning.lr = [1e-4, 5e-4]`. Later ones win: base, task, method, grid. In base and grid,
    an option of a method, a task or a model family applies to those that have it. The dense run of every
    model, task and seed is always there, once. A method may be there in several variants of its settings.

    Args:
        path: the TOML file.
        given: {dotted name: values} that win over the file, as `parse_set` returns them. Of the axes of PLACE, an entry
            keeps the values that it lists, and a value that no entry lists joins all of them. Any other setting is set
            everywhere; several values multiply.
        data: data set or directory of the tasks, and of the calibration unless `[base]` names another. In the file,
            "{data}/coco" is a directory below it.
        limit: number of samples to run the same on (see `limited`); the table is called so.

    Raises:
        ConfigError: an unknown name, a value out of range, or two different runs in one place.
    """
    document = read_toml(path)
    check_keys(document, ("base", "task", "method", "grid"), path.name)
    base = flat(document.get("base", {}), f"{path.name}: [base]")
    if data is not None:
        if DATA not in str(base.get("task.data")):
            base["task.data"] = data
        base.setdefault("calibration.data", data)
    special = {
        kind: of_each(document, kind, known, path.name) for kind, known in (("task", TASKS), ("method", PRUNERS))
    }
    entries = document.get("grid", [])
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path.name}: a table needs at least one [[grid]] entry")
    places = [f"{path.name}: [[grid]] {number}" for number in range(1, len(entries) + 1)]
    given = dict(given or {})
    axes = [axes_of(entry, where) for entry, where in zip(entries, places, strict=True)]
    settings = [
        flat({key: value for key, value in entry.items() if key not in AXES}, where)
        for entry, where in zip(entries, places, strict=True)
    ]
    _check_owned(base, axes, f"{path.name}: [base]")
    for own, chosen, where in zip(axes, settings, places, strict=True):
        _check_owned(chosen, [own], where)
        for name, value in chosen.items():
            if is_axis(name, value):
                check_values(name, value, where)
    _select(axes, {name: values for name, values in given.items() if name in PLACE})
    for own in axes:
        check_axes(own, path.name)
    overrides = {name: list(values) for name, values in given.items() if name not in PLACE}
    _check_owned(overrides, axes, "--set")
    cells: dict[tuple, Cell] = {}
    for listed, own, where in zip(settings, axes, places, strict=True):
        among = {name: value if is_axis(name, value) else [value] for name, value in listed.items()} | overrides
        for place in _places(own):
            # An option applies to the methods, tasks and models that have it.
            varied = {name: values for name, values in among.items() if _has(place, name)}
            for values in product(*varied.values()):
                chosen = dict(zip(varied, values, strict=True))
                several = [name for name, values in varied.items() if len(values) > 1]
                merged = {
                    **{name: value for name, value in base.items() if _has(place, name)},
                    **special["task"].get(place["task.name"], {}),
                    **special["method"].get(place["pruning.method"], {}),
                    **chosen,
                    **place,
                }
                cell = _cell(merged, several, where, data, limit)
                other = cells.setdefault(cell.place, cell)
                if other.config != cell.config:
                    raise ConfigError(
                        f"{where}: two different runs of {cell}; {_difference(other.config, cell.config)}. "
                        "A table compares methods under one set of settings: make it two tables, or a list in one entry"
                    )
    if not cells:
        raise ConfigError(f"{path.name}: nothing is left to run with this selection")
    tasks = dict.fromkeys(cell.config.task.name for cell in cells.values())
    defaults = _defaults(dict.fromkeys(cell.config.pruning.method for cell in cells.values()))
    names = labels((cell.row[1:3] for cell in cells.values()), defaults)
    held: dict[Any, Any] = {}
    return Table(
        name=path.stem + limit_name(limit),
        cells=tuple(
            replace(
                cell,
                label=names[cell.row[1:3]],
                config=replace(cell.config, **{part: once(getattr(cell.config, part), held) for part in PARTS}),
            )
            for cell in cells.values()
        ),
        headlines={name: TASKS[name].headline for name in tasks},
        defaults=defaults,
    )


def _defaults(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """{method: {option: its default in words}} of those methods that have options."""
    return {
        method: dict(setting(f.name, getattr(default, f.name)).split("=", 1) for f in fields(default))
        for method in methods
        if method != DENSE and fields(default := PRUNERS[method].options())
    }


def limited(config: RunConfig, limit: int) -> RunConfig:
    """The same run on `limit` samples of each split, and calibration on no more than about as many pairs.

    A batch of calibration has two pairs at least, as the losses need negatives, and at most half of them, so that there
    are two batches; a method that measures anew as it goes takes a step less rather than a step without a batch.
    """
    task, calibration, pruning = config.task, config.calibration, config.pruning
    batch_size = min(calibration.batch_size, max(2, limit // 2))
    n_batches = max(1, limit // batch_size)
    options = pruning.options
    if pruning.method != DENSE:
        options = Options(get_pruner(pruning.method).limited(options, n_batches))
    return replace(
        config,
        task=replace(task, limit=min(task.limit or limit, limit)),
        calibration=replace(calibration, batch_size=batch_size, n_batches=min(calibration.n_batches, n_batches)),
        pruning=replace(pruning, options=options),
    )


def _select(axes: list[dict[str, list]], asked: Mapping[str, Sequence[Any]]) -> None:
    """Narrows the axes of the entries, in place."""
    for axis, name in AXES.items():
        if name in asked:
            listed = {value for entry in axes for value in entry[axis]}
            for entry in axes:
                entry[axis] = [value for value in asked[name] if value in entry[axis] or value not in listed]


def _places(axes: Mapping[str, list]) -> Iterator[Settings]:
    pruned = [pair for pair in product(axes["methods"], axes["sparsities"]) if pair[0] != DENSE]
    for model, pruning, seed, task in product(axes["models"], [(DENSE, 0.0), *pruned], axes["seeds"], axes["tasks"]):
        yield dict(zip(PLACE, (model, *pruning, task, seed), strict=True))


OWNERS = {"model": "model.name", "pruning": "pruning.method", "task": "task.name"}  # whose options a part holds


def _options_of(part: str, owner: str) -> list[str]:
    """The names of the options of a model's family, a method or a task."""
    if part == "model":
        options = family_of(owner).options
    elif part == "pruning":
        options = NoOptions if owner == DENSE else PRUNERS[owner].options
    else:
        options = TASKS[owner].options
    return [option.name for option in fields(options)]


def _has(place: Settings, name: str) -> bool:
    """Whether a setting is there for a place of the table: an option only where its owner has it."""
    part, _, option = name.partition(".options.")
    return not option or part not in OWNERS or option in _options_of(part, place[OWNERS[part]])


def _check_owned(settings: Settings, axes: Sequence[Mapping[str, list]], where: str) -> None:
    """Refuses options that none of the models, methods or tasks on the axes has."""
    for name in settings:
        part, _, option = name.partition(".options.")
        if option and part in OWNERS:
            axis = next(axis for axis, own in AXES.items() if own == OWNERS[part])
            try:
                known = [each for own in axes for owner in own.get(axis, []) for each in _options_of(part, owner)]
            except (ValueError, OSError) as error:
                raise ConfigError(f"{where}: {error}") from None
            if option not in known:
                raise ConfigError(f"{where}: {part}.options: {unknown('option', option, dict.fromkeys(known))}")


def _cell(merged: Settings, several: Sequence[str], where: str, data: str | None, limit: int | None) -> Cell:
    """The cell of some settings; `several` are those that have more than one value in the table."""
    dense = merged["pruning.method"] == DENSE
    if dense:  # no pruning settings, so that it is the same run for all entries
        merged = {name: v for name, v in merged.items() if not name.startswith(("pruning.", "calibration."))}
    config = _placed(build(RunConfig, nested(merged), where), data, where)
    try:
        config = _plain(config)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    config = config if limit is None else limited(config, limit)
    of_pruning = "" if dense else variant(config, settings_read(config.pruning.method))
    others = [
        setting(_short(name), merged[name]) for name in several if not name.startswith(("pruning.", "calibration."))
    ]
    text = " ".join(filter(None, [of_pruning, *others]))
    return Cell(config, text, label(config.pruning.method, text), where)


def _short(name: str) -> str:
    """The name of a setting in a variant: its last component, with its part where a setting of pruning is called so."""
    part, _, key = name.rpartition(".")
    taken = {read.rpartition(".")[2] for method in PRUNERS for read in settings_read(method)}
    return f"{part.partition('.')[0]}_{key}" if key in taken else key


def _plain(config: RunConfig) -> RunConfig:
    """The config with only what the run reads and what differs from a default, so that equal runs are equal."""
    check_pruning(config.pruning)
    task, pruning, calibration = config.task, config.pruning, config.calibration
    chosen = build(TASKS[task.name].options, task.options, f"task {task.name!r}: options")
    config = replace(config, task=replace(task, options=Options(changed(chosen))))
    if pruning.method == DENSE:
        return config
    own = Options(get_pruner(pruning.method, pruning.options).given_options)
    read = settings_read(pruning.method)
    used = {name: value for name, value in changed(calibration).items() if f"calibration.{name}" in read}
    return replace(config, calibration=CalibrationConfig(**used), pruning=replace(pruning, options=own))


def _placed(config: RunConfig, data: str | None, where: str) -> RunConfig:
    """The config with the data directory in the place of DATA."""
    placed = {}
    for part in ("calibration", "task"):
        settings = getattr(config, part)
        if DATA in settings.data and data is None:
            raise ConfigError(f"{where}: {part}.data is {settings.data!r}: give the directory with --data DIR")
        placed[part] = replace(settings, data=settings.data.replace(DATA, data or DATA))
    return replace(config, **placed)


def _difference(a: RunConfig, b: RunConfig) -> str:
    for part in PARTS:
        for f in fields(PARTS[part]):
            one, two = getattr(getattr(a, part), f.name), getattr(getattr(b, part), f.name)
            if one != two:
                return f"{part}.{f.name} is {one!r} in one and {two!r} in the other"
    return "their settings differ"
