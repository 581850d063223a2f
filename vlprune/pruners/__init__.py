"""Pruning methods; a new one is a score function and a line in PRUNERS."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlprune.config import DENSE, PruningConfig, unknown
from vlprune.pruners.chita import CHITA, CHITA_PP, chita_update
from vlprune.pruners.iterate import STEPS, iterate, schedule
from vlprune.pruners.layerwise import LAYERWISE
from vlprune.pruners.magnitude import L2, LAMP, LOCALMP, OMP, RANDOM
from vlprune.pruners.multiflow import MULTIFLOW
from vlprune.pruners.obd import OBD
from vlprune.pruners.pruner import STATISTICS, Pruner, Search, prune_masks
from vlprune.pruners.snip import ITERSNIP, SNIP
from vlprune.pruners.sparsegpt import SPARSEGPT
from vlprune.pruners.tamt import LEARN, TAMT
from vlprune.pruners.wanda import ECOFLAP, WANDA

__all__ = [
    "LAYERWISE",
    "LEARN",
    "PRUNERS",
    "STATISTICS",
    "STEPS",
    "Pruner",
    "Search",
    "check_pruning",
    "get_pruner",
    "iterate",
    "prune_masks",
    "schedule",
]

_FROM_WEIGHTS = (RANDOM, OMP, LOCALMP, L2, LAMP)
_FROM_GRADIENTS = (SNIP, ITERSNIP, OBD, TAMT, CHITA, CHITA_PP)
_FROM_INPUTS = (WANDA, ECOFLAP, SPARSEGPT, MULTIFLOW)

PRUNERS: dict[str, Pruner] = {pruner.name: pruner for pruner in (*_FROM_WEIGHTS, *_FROM_GRADIENTS, *_FROM_INPUTS)}


def get_pruner(name: str, lam: float | None = None) -> Pruner:
    """The method of that name, of chita and chita++ with another ridge `lam` where one is given.

    Raises:
        ValueError: an unknown name, with what exists; a ridge for a method that has none.
    """
    if name not in PRUNERS:
        raise ValueError(unknown("method", name, PRUNERS))
    pruner = PRUNERS[name]
    if lam is None:
        return pruner
    if pruner.update is not chita_update:
        raise ValueError(f"method {name!r} has no ridge `lam`; chita and chita++ have one")
    return replace(pruner, update=partial(chita_update, lam=lam))


def check_pruning(config: PruningConfig) -> None:
    """Raises a ValueError for an unknown method and for settings that the method does not have."""
    if config.method == DENSE:
        return
    pruner = get_pruner(config.method, config.lam)
    if config.pattern is not None and not pruner.takes_pattern:
        takes = ", ".join(name for name, other in PRUNERS.items() if other.takes_pattern)
        raise ValueError(f"method {config.method!r} takes no pattern; those that score weights in one shot do: {takes}")
