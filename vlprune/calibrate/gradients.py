"""Gradients of the pretraining losses at every layer: their means, and those of each batch by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import torch
from torch import Generator, Tensor

from vlprune.batch import Batch
from vlprune.calibrate.rows import Rows

ALIGNMENT = "itc"  # the loss that `alignment` weighs


class Pretrained(Protocol):
    """What the loss needs of a model."""

    @property
    def scored_losses(self) -> Sequence[str]: ...  # noqa: D102
    def pretraining_losses(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]: ...  # noqa: D102


class Loss:
    """The weighted sum of the pretraining losses of a batch.

    Args:
        model: the model, which defines `pretraining_losses`.
        alignment: weight of the ITC loss; the others weigh 1.

    Raises:
        ValueError: another weight than 1 for a model without an ITC loss.
    """

    def __init__(self, model: Pretrained, alignment: float) -> None:
        if alignment != 1 and ALIGNMENT not in model.scored_losses:
            there = ", ".join(model.scored_losses)
            raise ValueError(f"alignment weighs the loss {ALIGNMENT!r}, which the model does not have; it has: {there}")
        self.model = model
        self.weights = {name: alignment if name == ALIGNMENT else 1.0 for name in model.scored_losses}

    def __call__(self, batch: Batch, generator: Generator) -> Tensor:
        """The loss of a batch, a scalar; the generator makes all random choices."""
        losses = self.model.pretraining_losses(batch, generator)
        return torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()


class Gradients:
    """Running sums of the gradients of batches, and the gradients themselves as rows.

    Args:
        weights: (layer name, weight) of the layers to measure.
        needs: which of "grad", "grad_sq" and "grad_rows" to measure.
        rows: the store of the gradient rows; None: a new one.
    """

    def __init__(self, weights: Sequence[tuple[str, Tensor]], needs: Set[str], rows: Rows | None) -> None:
        self.names, self.weights = [name for name, _ in weights], [weight for _, weight in weights]
        self.sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("grad", "grad_sq") if kind in needs}
        self.rows = rows or Rows()
        self.keeps_rows = "grad_rows" in needs

    def add(self, loss: Tensor, batch: int) -> None:
        """Adds the gradients of the loss of batch number `batch`."""
        if not loss.isfinite():
            raise RuntimeError(f"the loss is not finite in batch {batch}")
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                raise RuntimeError(f"layer {name} has no part in the losses")
            if self.keeps_rows:
                _check_gradient(name, gradient, f" in batch {batch}")
                self.rows.append(name, gradient)
            if "grad_sq" in self.sums:
                if name in self.sums["grad_sq"]:
                    self.sums["grad_sq"][name].addcmul_(gradient, gradient)
                else:
                    self.sums["grad_sq"][name] = gradient.square()
            if "grad" in self.sums:
                if name in self.sums["grad"]:
                    self.sums["grad"][name].add_(gradient)
                else:
                    # The store keeps what it is given.
                    self.sums["grad"][name] = gradient.clone() if self.keeps_rows else gradient

    def means(self, name: str, n_batches: int) -> dict[str, Tensor]:
        """{statistic: (out, in)}, means over the batches; divides the sums in place, so call it once for each layer."""
        means = {kind: sums[name].div_(n_batches).contiguous() for kind, sums in self.sums.items()}
        for mean in means.values():
            _check_gradient(name, mean)
        return means


def _check_gradient(name: str, gradient: Tensor, where: str = "") -> None:
    # A sum is not finite where an entry is not, and takes a fraction of the time of a test of every entry.
    if not gradient.sum().isfinite():
        raise RuntimeError(f"the gradient of layer {name} is not finite{where}")
