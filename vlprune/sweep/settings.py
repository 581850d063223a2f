"""Settings by their dotted names: read from tables and command lines, the names and types checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from eval import TASKS
from vlprune.config import DENSE, PARTS, ConfigError, check_field, hints, unknown
from vlprune.pruners import PRUNERS
from vlprune.sweep.options import Options

# The axes of a table, and the setting that each is a list of.
AXES = {
    "models": "model.name",
    "methods": "pruning.method",
    "sparsities": "pruning.sparsity",
    "tasks": "task.name",
    "seeds": "seed",
}
PLACE = tuple(AXES.values())

T = TypeVar("T")
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
                _check_setting(f"{part}.{key}", where)
                for one in value if is_axis(f"{part}.{key}", value) else [value]:
                    check_field(PARTS[part], key, one, f"{where}: {part}.{key}")
                found[f"{part}.{key}"] = value
    return found


def _check_setting(name: str, where: str) -> None:
    """Refuses what is no setting, or one that an axis sets."""
    part, _, key = name.partition(".")
    if part not in PARTS:
        raise ConfigError(f"{where}: {unknown('setting', name, (*PLACE, *PARTS))}")
    if key in ("", "options"):
        there = [f"{name}.NAME"] if key else [f"{part}.{f.name}" for f in fields(PARTS[part])]
        raise ConfigError(f"{where}: {name} is no setting but holds some: {', '.join(there)}")
    if axis := next((axis for axis, own in AXES.items() if own == name), None):
        raise ConfigError(f"{where}: {name} is set by the list {axis!r} of [[grid]]")
    known = [f.name for f in fields(PARTS[part])]
    if key.split(".")[0] not in known:
        raise ConfigError(f"{where}: {part}: {unknown('key', key, known)}")


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


def parse_toml(text: str) -> dict[str, Any]:
    """The document of a text.

    Raises:
        ValueError: it is no TOML, is nested too deeply, or has a whole number of more digits than Python reads.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("lists are nested too deeply") from None
    except ValueError:
        raise ValueError("a whole number has more digits than can be read") from None


def check_values(name: str, values: Sequence[Any], where: str) -> None:
    """Refuses an empty list of values of a setting, and one that names a value twice."""
    if not values:
        raise ConfigError(f"{where}: {name} needs at least one value, got an empty list")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ConfigError(f"{where}: {name} names {value!r} twice")


def is_axis(name: str, value: object) -> bool:
    """Whether the value of a setting is a list of values: of a setting that is a list itself, a list of lists."""
    part, _, key = name.partition(".")
    hint = hints(PARTS[part]).get(key)
    if get_origin(hint) is tuple and get_args(hint):
        return isinstance(value, list) and bool(value) and all(isinstance(one, list) for one in value)
    return isinstance(value, list)


def parse_values(text: str) -> list[Any]:
    """Values separated by commas, written as in TOML; what is no TOML is text."""
    try:
        return parse_toml(f"values = [{text}]")["values"]
    except ValueError:
        parts = [part.strip() for part in text.split(",")]
        return [_value(part) for part in parts if part]


def _value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


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


def parse_set(texts: Sequence[str]) -> dict[str, list[Any]]:
    """{dotted name: values} of texts such as "finetuning.lr=1e-4,5e-4" or "task.test=val".

    Values are written as in TOML and separated by commas; what is no TOML is text.

    Raises:
        ConfigError: a text without "=", a name that is no setting, or one that is given twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = {"model": "model.name"}.get(name.strip(), name.strip())
        if not equals or not values.strip():
            raise ConfigError(f"--set takes NAME=VALUE or NAME=VALUE,VALUE, got {text!r}")
        if name in found:
            raise ConfigError(f"--set {name} is given twice")
        if name not in PLACE:
            _check_setting(name, "--set")
        found[name] = parse_values(values)
        check_values(name, found[name], "--set")
    return found


def file_name(texts: Sequence[str]) -> str:
    """What the name of a table gets for settings of the command line: "-lr=1e-4,5e-4" for finetuning.lr=1e-4,5e-4."""
    found = ""
    for text in texts:
        name, _, value = text.partition("=")
        found += "-" + re.sub(r"[^-+=.,0-9A-Za-z]+", "_", f"{name.rpartition('.')[2]}={value}")
    return found


def settings_given(options: Options) -> tuple[dict[str, list[Any]], str]:
    """{setting: values} of the command line, and what the name of the table gets for them."""
    kinds: dict[str, Callable[[str], Any]] = {"sparsities": float, "seeds": int}
    asked = {axis: _split(getattr(options, axis), axis, kinds.get(axis, str)) for axis in AXES}
    axes = {AXES[axis]: values for axis, values in asked.items() if values is not None}
    settings = parse_set(options.set)
    if twice := sorted(axes.keys() & settings.keys()):
        raise ConfigError(f"{twice[0]} is given twice, by --set and by an option of its own")
    others = [text for text in options.set if text.partition("=")[0].strip() not in (*AXES.values(), "model")]
    narrows = "-selection" if axes or len(others) < len(options.set) else ""
    return {**axes, **settings}, narrows + file_name(others)


def _split(text: str | None, option: str, convert: Callable[[str], T]) -> list[T] | None:
    if text is None:
        return None
    try:
        values = [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--{option} must be numbers separated by commas, got {text!r}") from None
    if not values:
        raise ConfigError(f"--{option} names nothing, got {text!r}")
    check_values(option, values, f"--{option}")
    return values
