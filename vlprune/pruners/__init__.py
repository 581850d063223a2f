"""Pruning methods; a new one is a file with a Pruner, and its name in MODULES."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vlprune.config import DENSE, ConfigError, Options, PruningConfig, unknown
from vlprune.pruners.iterate import STEPS, StepOptions, iterate, schedule
from vlprune.pruners.layerwise import LAYERWISE
from vlprune.pruners.pruner import Pruner, Search, prune_masks, search_masks

__all__ = [
    "LAYERWISE",
    "MODULES",
    "PRUNERS",
    "STEPS",
    "Pruner",
    "Search",
    "StepOptions",
    "check_pruning",
    "get_pruner",
    "iterate",
    "prune_masks",
    "schedule",
    "search_masks",
]

# The registry: every Pruner that one of these modules of this package defines is a method.
MODULES = (
    "magnitude",
    "snip",
    "obd",
    "tamt",
    "chita",
    "wanda",
    "sparsegpt",
    "multiflow",
)
_NONE = Options()

PRUNERS: dict[str, Pruner] = {
    pruner.name: pruner
    for module in MODULES
    for pruner in vars(import_module(f"{__name__}.{module}")).values()
    if isinstance(pruner, Pruner)
}


def get_pruner(name: str, options: Mapping[str, Any] = _NONE) -> Pruner:
    """The method of that name, with its options where they differ from their defaults, such as {"lam": 1.0}.

    Raises:
        ConfigError: an unknown name, with what exists; an option that the method does not have; a bad value of one.
    """
    if name not in PRUNERS:
        raise ConfigError(unknown("method", name, PRUNERS))
    return PRUNERS[name].with_options(options)


def check_pruning(config: PruningConfig) -> None:
    """Raises a ConfigError for an unknown method and for settings that the method does not have."""
    if config.method == DENSE:
        return
    pruner = get_pruner(config.method, config.options)
    if config.pattern is not None and not pruner.takes_pattern:
        takes = ", ".join(name for name, other in PRUNERS.items() if other.takes_pattern)
        raise ConfigError(
            f"method '{config.method}' takes no pattern; those that score weights in one shot do: {takes}"
        )
