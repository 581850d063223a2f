"""Variants: one method under several settings, and what tables call each of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from vlprune.config import DENSE, CalibrationConfig, FinetuningConfig, PruningConfig, RunConfig, TaskConfig, changed

Defaults = Mapping[str, Mapping[str, str]]
NO_DEFAULTS: Defaults = MappingProxyType({})
_NONE = "None"


def setting(name: str, value: object) -> str:
    """The text of one setting in a variant: "lam=0.1", "alignment=4" for 4.0, "data=coco" for a path that ends so.

    Args:
        name: dotted name, such as "pruning.options.lam"; its last component is shown.
        value: plain value.
    """
    key = name.rpartition(".")[2]
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return f"{key}={text.rstrip('/').rpartition('/')[2] if key == 'data' else text}"


def variant(config: RunConfig, reads: Collection[str] | None = None) -> str:
    """The settings of calibration and pruning that differ from their defaults, as in "alignment=4 pattern=2:4 lam=0.1".

    Method and sparsity do not count, options follow the fields, and the dense model has no variant ("").

    Args:
        config: settings of the run.
        reads: dotted names of the settings that the method reads, such as {"calibration.alignment",
            "pruning.options.lam"}; others do not count. None: the method reads all.
    """
    if config.pruning.method == DENSE:
        return ""
    found = _differing(config.calibration, config.pruning)
    return " ".join(setting(name, value) for name, value in found if reads is None or name in reads)


@lru_cache(maxsize=1024)
def _differing(calibration: CalibrationConfig, pruning: PruningConfig) -> tuple[tuple[str, Any], ...]:
    """(dotted name, value) of the settings but method and sparsity; many runs have the same parts."""
    found = {
        **{f"calibration.{name}": value for name, value in changed(calibration).items()},
        **{f"pruning.{name}": value for name, value in changed(pruning).items()},
        **{f"pruning.options.{name}": value for name, value in pruning.options.items()},
    }
    return tuple((name, value) for name, value in found.items() if name not in ("pruning.method", "pruning.sparsity"))


def settings(variant: str) -> dict[str, str]:
    """{setting: value} of a variant; a value may hold spaces, as in "data=my photos lam=0.1"."""
    return dict(part.split("=", 1) for part in re.split(r" (?=\w+=)", variant) if "=" in part)


def label(method: str, variant: str) -> str:
    """The full name of a variant: "chita++ alignment=4", or the method alone for the defaults."""
    return f"{method} {variant}".rstrip()


def title(config: RunConfig, label: str) -> str:
    """What people call a run whose method and variant have this label: "tiny-blip chita++@75% lam=0.1 vqa seed 0"."""
    method, space, settings = label.partition(" ")
    at = "" if method == DENSE else f"@{100 * config.pruning.sparsity:g}%"
    return f"{config.model.name} {method}{at}{space}{settings} {config.task.name} seed {config.seed}"


def labels(pairs: Iterable[tuple[str, str]], defaults: Defaults = NO_DEFAULTS) -> dict[tuple[str, str], str]:
    """{(method, variant): how a table with these pairs calls it}, the variants of a method one after another.

    A method that has one variant there is called by its name alone. Several are told apart by the settings that differ
    between them, and a variant that leaves such a setting out shows the default: "chita++ alignment=1" beside "chita++
    alignment=4". A setting without a known default, or with the default None, is left out: "omp" beside "omp
    pattern=2:4".

    Args:
        pairs: methods with their variants; floors have variants as well.
        defaults: {method: {option: default as text}}; the defaults of the configs' own fields are known.
    """
    variants_of: dict[str, dict[str, dict[str, str]]] = {}
    for method, variant in pairs:
        variants_of.setdefault(method, {})[variant] = settings(variant)
    found = {}
    for method, variants in variants_of.items():
        keys = dict.fromkeys(key for own in variants.values() for key in own)
        default = {**_FIELDS, **defaults.get(method, {})}
        values = {key: [own.get(key, default.get(key, _NONE)) for own in variants.values()] for key in keys}
        differ = [key for key in keys if len(set(values[key])) > 1]
        for i, variant in enumerate(variants):
            shown = " ".join(f"{key}={values[key][i]}" for key in differ if values[key][i] != _NONE)
            found[method, variant] = label(method, shown)
    return found


def find(name: str, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that a name means: those of its method with its settings, or the one that `labels` calls so."""
    called = labels(pairs)
    method, _, rest = name.partition(" ")
    wanted = settings(rest)
    if rest and not wanted:
        return []
    matching = [
        (own, variant)
        for own, variant in called
        if own == method and wanted.items() <= {**_FIELDS, **settings(variant)}.items()
    ]
    exact = [pair for pair in matching if called[pair] == name]
    return exact or matching


def _field_defaults() -> dict[str, str]:
    # Of two fields of one name, such as batch_size, the earlier stage's counts.
    found: dict[str, str] = {}
    for part in (CalibrationConfig, PruningConfig, FinetuningConfig, TaskConfig):
        for f in fields(part):
            if f.name != "options":
                found.setdefault(*setting(f.name, f.default).split("=", 1))
    return found


_FIELDS = _field_defaults()
