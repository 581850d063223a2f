"""What tables call the variants of a method: one method under several settings of calibration and pruning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields

from vlprune.config import CalibrationConfig, PruningConfig, plain

_DEFAULTS = {f.name: plain(f.default) for part in (CalibrationConfig, PruningConfig) for f in fields(part)}
_NONE = "None"


def settings(variant: str) -> dict[str, str]:
    """{setting: value} of a variant, see `config.variant`; a value may hold spaces."""
    return dict(part.split("=", 1) for part in re.split(r" (?=\w+=)", variant) if "=" in part)


def label(method: str, variant: str) -> str:
    """The full name of a variant: "chita++ alignment=4", or the method alone for the defaults."""
    return f"{method} {variant}".rstrip()


def labels(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """{(method, variant): how a table with these calls it}, the variants of a method one after another.

    The method alone where it has one variant there, else with the settings that tell its variants apart, defaults too:
    "chita++ alignment=1". A setting that has no value is left out: "omp" beside "omp pattern=2:4".
    """
    of_method: dict[str, dict[str, dict[str, str]]] = {}
    for method, variant in pairs:
        of_method.setdefault(method, {})[variant] = settings(variant)
    found = {}
    for method, variants in of_method.items():
        keys = dict.fromkeys(key for own in variants.values() for key in own)
        differ = [key for key in keys if len({_value(own, key) for own in variants.values()}) > 1]
        for variant, own in variants.items():
            shown = {key: _value(own, key) for key in differ}
            found[method, variant] = label(method, " ".join(f"{k}={v}" for k, v in shown.items() if v != _NONE))
    return found


def find(name: str, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (method, variant) that a name means: all with its method and its settings, or the one that is called so."""
    called = labels(pairs)
    method, _, rest = name.partition(" ")
    wanted = settings(rest)
    if rest and not wanted:
        return []
    matching = [
        (own, variant)
        for own, variant in called
        if own == method and all(_value(settings(variant), key) == value for key, value in wanted.items())
    ]
    exact = [pair for pair in matching if called[pair] == name]
    return exact or matching


def _value(own: dict[str, str], key: str) -> str:
    return own.get(key, _DEFAULTS.get(key, _NONE))
