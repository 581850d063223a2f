"""Config dataclasses from nested plain values, such as a TOML file or a record holds."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from vlprune.config import ConfigError, unknown

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A config dataclass from nested plain values; what is not given keeps its default.

    Args:
        cls: RunConfig or one of its parts.
        values: {field: value}, a part being a mapping of its own.
        where: what an error calls the place the values came from.

    Raises:
        ConfigError: an unknown field, a value of another type, or one out of range.
    """
    arguments = typed(cls, values, where)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def typed(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as the fields of a config dataclass hold them, as in `build`, but their ranges are not looked at."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{where}: {unknown('key', name, known)}")
        arguments[name] = _coerce(value, hints[name], f"{where}.{name}")
    return arguments


def _coerce(value: Any, hint: Any, where: str) -> Any:
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(typing.cast(type, hint), value, where)
        raise ConfigError(f"{where} must be a table, got {value!r}")
    if isinstance(hint, types.UnionType):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if value is None else _coerce(value, inner, where)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_coerce(v, part, where) for v, part in zip(value, parts, strict=True))
        raise ConfigError(f"{where} must be a list of {len(parts)} values, got {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
