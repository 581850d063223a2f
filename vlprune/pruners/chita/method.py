"""CHITA and CHITA++ as methods: the problem that calibration poses, for all layers together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from vlprune.config import Positive, validated
from vlprune.masks import Masks
from vlprune.pruners.chita.search import Part
from vlprune.pruners.chita.solver import block_boundaries, solve_parts
from vlprune.pruners.iterate import STEPS, StepOptions
from vlprune.pruners.pruner import Alive, Pruner, Stats, Weights


@validated
class ChitaOptions:
    """Options of chita.

    Attributes:
        lam: ridge λ for each gradient row; the damping of n rows is n * λ / 2.
    """

    lam: Positive = 1e-2


@validated
class ChitaPPOptions(StepOptions, ChitaOptions):
    """Options of chita++: those of chita and of the steps.

    Attributes:
        lam: ridge λ for each gradient row; the damping of n rows is n * λ / 2.
        steps: number of pruning steps.
        step_batches: number of fresh calibration batches that each step measures on, a gradient row for each.
    """


DEFAULTS = ChitaOptions()


def chita_update(
    weights: Weights, stats: Stats, *, n_pruned: int, alive: Alive | None, options: ChitaOptions = DEFAULTS
) -> Masks:
    """Survivors of all layers and their new values.

    The first-order term is the sum of the rows over the number B of samples behind a row: a mean gradient of B samples
    stands for 1/B of the Fisher information of a sample, so that this is the expansion of one loss. The reference takes
    B from its first batch; here it is the mean over the batches.

    Args:
        weights: {layer name: (out, in)}.
        stats: for every layer `grad_rows` (n, out * in), the mean gradient of each batch, with as many rows in all
            layers, and `row_size` (). Rows are looked up anew for every pass over them.
        n_pruned: number of entries to prune in all layers together.
        alive: entries that may be kept; None for all.
        options: the ridge.

    Returns:
        Masks with `weights`.
    """
    parts, n_rows = [], {}
    for name, weight in weights.items():
        rows = stats[name]["grad_rows"]
        n_rows[name] = len(rows)
        alpha = (rows.sum(dim=0) / stats[name]["row_size"]).to(weight.dtype)
        if not alpha.isfinite().all():
            raise ValueError(f"layer '{name}': gradient rows must be finite, got NaN or infinity")
        mask = None if alive is None else alive[name].view(1, -1)
        parts.append(Part(weight.reshape(1, -1), alpha[None], mask, partial(_rows, stats, name)))
    if len(set(n_rows.values())) > 1:
        raise ValueError(f"every layer needs as many rows in 'grad_rows', got {n_rows}")
    n_keep = sum(weight.numel() for weight in weights.values()) - n_pruned
    blocks = [block_boundaries(weight.numel()) for weight in weights.values()]
    solved = solve_parts(parts, blocks, n_keep, damping=max(n_rows.values()) * options.lam / 2)
    return Masks(
        {name: support.view_as(weights[name]) for name, (_, support) in zip(weights, solved)},
        {name: values.view_as(weights[name]) for name, (values, _) in zip(weights, solved)},
    )


CHITA = Pruner(
    name="chita",
    source="Benbaki et al. 2023 (arXiv:2302.14623)",
    needs=frozenset({"grad_rows", "row_size"}),
    update=chita_update,
    options=ChitaOptions,
)
CHITA_PP = replace(
    CHITA,
    name="chita++",
    source="CHITA in steps, Benbaki et al. 2023 (arXiv:2302.14623)",
    search=STEPS,
    options=ChitaPPOptions,
)


def _rows(stats: Stats, name: str) -> Float[Tensor, "1 n p"]:
    return stats[name]["grad_rows"][None]
