"""Connection sensitivity, in one shot or in steps."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vlprune.pruners.iterate import STEPS, StepOptions
from vlprune.pruners.pruner import LayerStats, Pruner


def snip_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:
    """Connection sensitivity |dL/dw * w|, Lee et al. 2019 (arXiv:1810.02340).

    The division by the sum over all layers is left out: it changes no comparison.

    Args:
        weight: (out, in).
        stats: `grad` (out, in), the mean gradient of the loss.

    Returns:
        (out, in), not negative.
    """
    return (stats["grad"] * weight).abs()


SNIP = Pruner(name="snip", source="Lee et al. 2019 (arXiv:1810.02340)", needs=frozenset({"grad"}), score=snip_score)
ITERSNIP = Pruner(
    name="itersnip",
    source="iterative SNIP, de Jorge et al. 2021 (arXiv:2006.09081)",
    needs=frozenset({"grad"}),
    score=snip_score,
    search=STEPS,
    options=StepOptions,
)
