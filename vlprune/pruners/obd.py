"""Second-order sensitivity of single weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vlprune.pruners.pruner import LayerStats, Pruner


def obd_score(weight: Float[Tensor, "out in"], stats: LayerStats) -> Float[Tensor, "out in"]:
    """Rise of the loss without the entry, h w^2 / 2, LeCun et al. 1989 (Optimal Brain Damage).

    The diagonal h of the Hessian is that of the empirical Fisher information, the mean squared gradient, as in Theis et
    al. 2018 (arXiv:1801.05787). Deviation: its gradients are those of batches instead of samples.

    Args:
        weight: (out, in).
        stats: `grad_sq` (out, in), the mean over the batches of the squared gradient of a batch.

    Returns:
        (out, in), not negative.
    """
    return stats["grad_sq"] * weight.square() / 2


OBD = Pruner(
    name="obd",
    source="LeCun et al. 1989 with the Fisher information of Theis et al. 2018 (arXiv:1801.05787)",
    needs=frozenset({"grad_sq"}),
    score=obd_score,
)
