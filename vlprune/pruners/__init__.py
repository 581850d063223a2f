"""Pruning methods; a new one is a score function and a line in PRUNERS."""

from __future__ import annotations

from vlprune.config import unknown
from vlprune.pruners.chita import CHITA, CHITA_PP
from vlprune.pruners.iterate import iterate, schedule
from vlprune.pruners.magnitude import L2, LAMP, LOCALMP, OMP, RANDOM
from vlprune.pruners.multiflow import MULTIFLOW
from vlprune.pruners.pruner import STATISTICS, Pruner, prune_masks
from vlprune.pruners.snip import ITERSNIP, SNIP

__all__ = ["PRUNERS", "STATISTICS", "Pruner", "get_pruner", "iterate", "prune_masks", "schedule"]

PRUNERS: dict[str, Pruner] = {
    pruner.name: pruner for pruner in (RANDOM, OMP, LOCALMP, L2, LAMP, SNIP, ITERSNIP, MULTIFLOW, CHITA, CHITA_PP)
}


def get_pruner(name: str) -> Pruner:
    """The method of that name; a ValueError lists what exists."""
    if name not in PRUNERS:
        raise ValueError(unknown("method", name, PRUNERS))
    return PRUNERS[name]
