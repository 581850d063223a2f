"""What a command line asks of a table, values of its axes, settings, a number of samples; the name of that table."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import tyro

from vlprune.config import PARTS, ConfigError, unknown

# The axes of a table, and the setting that each is a list of.
AXES = {
    "models": "model.name",
    "methods": "pruning.method",
    "sparsities": "pruning.sparsity",
    "tasks": "task.name",
    "seeds": "seed",
}
PLACE = tuple(AXES.values())
SELECTION = "-selection"  # what the name of a table gets whose axes have other values than the file

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What is asked of a table. Lists are separated by commas.

    Attributes:
        models: models to take instead of those of the table.
        methods: methods to take; the dense model is always there.
        sparsities: pruned fractions, for example 0.63,0.75.
        tasks: tasks to take.
        seeds: seeds to take, for example 0,1,2.
        set: settings as NAME=VALUE or NAME=VALUE,VALUE that win over the table, such as finetuning.lr=1e-4 or
            seed=0,1,2; several values multiply. May be given several times.
        limit: the same on so many samples of each split, calibrated on about as many.
    """

    models: str | None = None
    methods: str | None = None
    sparsities: str | None = None
    tasks: str | None = None
    seeds: str | None = None
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    limit: int | None = None


def check_setting(name: str, where: str) -> None:
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
            check_setting(name, "--set")
        found[name] = parse_values(values)
        check_values(name, found[name], "--set")
    return found


def limit_name(limit: int | None) -> str:
    """What the name of a table gets for a number of samples."""
    return "" if limit is None else f"-limit-{limit}"


def file_name(texts: Sequence[str]) -> str:
    """What the name of a table gets for settings of the command line: "-lr=1e-4,5e-4" for finetuning.lr=1e-4,5e-4."""
    found = ""
    for text in texts:
        name, _, value = text.partition("=")
        found += "-" + re.sub(r"[^-+=.,0-9A-Za-z]+", "_", f"{name.rpartition('.')[2]}={value}")
    return found


def settings_given(options: Given) -> tuple[dict[str, list[Any]], str]:
    """{setting: values} of the command line, and what the name of the table gets for them."""
    kinds: dict[str, Callable[[str], Any]] = {"sparsities": float, "seeds": int}
    asked = {axis: _split(getattr(options, axis), axis, kinds.get(axis, str)) for axis in AXES}
    axes = {AXES[axis]: values for axis, values in asked.items() if values is not None}
    settings = parse_set(options.set)
    if twice := sorted(axes.keys() & settings.keys()):
        raise ConfigError(f"{twice[0]} is given twice, by --set and by an option of its own")
    others = [text for text in options.set if text.partition("=")[0].strip() not in (*AXES.values(), "model")]
    narrows = SELECTION if axes or len(others) < len(options.set) else ""
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
