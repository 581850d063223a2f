"""Settings by their dotted names, read from tables, the names and types checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from eval import TASKS
from vlprune.config import DENSE, PARTS, ConfigError, check_field, hints, unknown
from vlprune.pruners import PRUNERS
from vlprune.sweep.given import AXES, check_setting, check_values, parse_toml

Settings = dict[str, Any]  # {dotted name: value}, such as {"finetuning.lr": 1e-4}


def read_toml(path: Path) -> dict[str, Any]:
    """The document of a table's file.

    Raises:
        ConfigError: no such file, one that cannot be read, or no TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no table {str(path)!r}") from None
    except ValueError as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the table {str(path)!r}: {error.strerror}") from None


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table, got {value!r}")
    return value


def check_keys(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuses a key that is not known."""
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: {unknown('key', key, known)}")


def flat(values: object, where: str) -> Settings:
    """{dotted name: value} of nested tables, the names checked."""
    found: Settings = {}
    for part, inner in _table(values, where).items():
        check_keys({part: inner}, tuple(PARTS), where)
        for key, value in _table(inner, f"{where}: {part}").items():
            if key == "options":
                found |= {
                    f"{part}.options.{name}": one for name, one in _table(value, f"{where}: {part}.options").items()
                }
            else:
                check_setting(f"{part}.{key}", where)
                for one in value if is_axis(f"{part}.{key}", value) else [value]:
                    check_field(PARTS[part], key, one, f"{where}: {part}.{key}")
                found[f"{part}.{key}"] = value
    return found


def of_each(document: Mapping[str, Any], kind: str, known: Collection[str], name: str) -> dict[str, Settings]:
    """Settings of the runs of one task or one method."""
    found = {}
    for each, values in _table(document.get(kind, {}), f"{name}: [{kind}]").items():
        if each not in known:
            raise ConfigError(f"{name}: [{kind}.{each}]: {unknown(kind, each, known)}")
        found[each] = flat(values, f"{name}: [{kind}.{each}]")
    return found


def axes_of(entry: object, where: str) -> dict[str, list]:
    """{axis: values} of an entry."""
    values = _table(entry, where)
    parts = tuple(part for part in PARTS if f"{part}s" not in AXES or isinstance(values.get(part), dict))
    check_keys(values, (*AXES, *parts), where)
    axes = {"seeds": [0], **{axis: values[axis] for axis in AXES if axis in values}}
    for axis, listed in axes.items():
        if not isinstance(listed, list) or not listed or not all(isinstance(v, str | int | float) for v in listed):
            raise ConfigError(f"{where}: {axis} must be a list of at least one name or number, got {listed!r}")
    only_dense = axes.get("methods") == [DENSE]
    for axis in AXES:
        if axis not in axes and not (axis == "sparsities" and only_dense):
            raise ConfigError(f"{where}: the list {axis!r} is missing")
        check_values(axis, axes.get(axis, [None]), where)
    return {axis: list(axes.get(axis, [])) for axis in AXES}


def is_axis(name: str, value: object) -> bool:
    """Whether the value of a setting is a list of values: of a setting that is a list itself, a list of lists."""
    part, _, key = name.partition(".")
    hint = hints(PARTS[part]).get(key)
    if get_origin(hint) is tuple and get_args(hint):
        return isinstance(value, list) and bool(value) and all(isinstance(one, list) for one in value)
    return isinstance(value, list)


def check_axes(axes: Mapping[str, list], where: str) -> None:
    """Refuses values of the axes that are no names of methods and tasks, or of another type."""
    for model in axes["models"]:
        if not isinstance(model, str):
            raise ConfigError(f"{where}: a model must be a name or a path, got {model!r}")
    for method in axes["methods"]:
        if method != DENSE and method not in PRUNERS:
            raise ConfigError(f"{where}: {unknown('method', str(method), (DENSE, *PRUNERS))}")
    for task in axes["tasks"]:
        if task not in TASKS:
            raise ConfigError(f"{where}: {unknown('task', str(task), TASKS)}")
    for sparsity in axes["sparsities"]:
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
            raise ConfigError(f"{where}: a sparsity must be a number in [0, 1), got {sparsity!r}")


def nested(settings: Settings) -> dict[str, Any]:
    """Nested plain values of settings by their dotted names: {"task": {"test": "val"}} of {"task.test": "val"}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *parts, last = name.split(".")
        inner = found
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found
