"""Statistics: what calibration can measure at a layer, and what everyone who plans with them must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistic:
    """A kind of measurement at a layer with a weight (out, in).

    Attributes:
        shape: (out, in) -> shape of the measured tensor; None for a length that depends on the calibration.
        reads_losses: whether it is measured through the pretraining losses, so that `calibration.alignment` changes it.
        stored: whether a store keeps it as an artifact; the others are measured anew where they are needed.
    """

    shape: Callable[[int, int], tuple[int | None, ...]]
    reads_losses: bool
    stored: bool = True


STATISTICS: dict[str, Statistic] = {
    # The sum over all positions of the squared input of each input node, up to a positive factor common to the layer.
    "input_sq": Statistic(lambda _, n_in: (n_in,), reads_losses=False),
    # The same for the products of the inputs of two nodes; `input_sq` is the diagonal.
    "input_outer": Statistic(lambda _, n_in: (n_in, n_in), reads_losses=False),
    # The gradient of the loss, mean over the batches.
    "grad": Statistic(lambda n_out, n_in: (n_out, n_in), reads_losses=True),
    # The squared gradient of each batch, mean over the batches.
    "grad_sq": Statistic(lambda n_out, n_in: (n_out, n_in), reads_losses=True),
    # The gradient of each batch. As large as the model times the number of batches: too large for a store.
    "grad_rows": Statistic(lambda n_out, n_in: (None, n_out * n_in), reads_losses=True, stored=False),
    # The mean number of samples behind a gradient row; measured with the rows and of use with them alone.
    "row_size": Statistic(lambda _n_out, _n_in: (), reads_losses=False, stored=False),
    # The size of the loss's derivative along random noise on the layer, by a finite difference.
    "zo_grad": Statistic(lambda _n_out, _n_in: (), reads_losses=True),
}
