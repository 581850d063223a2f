"""Finite differences of the pretraining losses along noise on one layer: gradients without backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vlprune.batch import Batch
from vlprune.calibrate.gradients import Loss
from vlprune.graph import BipartiteLayer

EPSILON = 1e-3  # step of the finite difference, as in Sung et al. 2024


class Weighted(Protocol):
    """What finite differences need of a model."""

    def weight(self, name: str) -> nn.Parameter: ...  # noqa: D102


class Differences:
    """Finite differences of the loss along noise on one layer at a time.

    Args:
        model: with the weights, which are as before after each batch.
        layers: the layers to measure.
        loss: function of a batch, the scalar loss of the model as it is.
        seed: seeds the noise and the random choices of the losses.
    """

    def __init__(self, model: Weighted, layers: Sequence[BipartiteLayer], loss: Loss, seed: int) -> None:
        self.model, self.layers, self.loss = model, layers, loss
        self.seeds = torch.Generator().manual_seed(seed)
        self.sums = dict.fromkeys((layer.name for layer in layers), 0.0)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Adds the differences of a batch: two losses for each layer, with equal random choices."""
        seed = int(torch.randint(2**62, (), generator=self.seeds))
        for layer in self.layers:
            weight = self.model.weight(layer.name)
            own = weight.clone()
            # The same seed for every layer, so that what is measured of one does not depend on the others.
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
            losses = []
            try:
                for step in (EPSILON, -EPSILON):
                    weight.copy_(torch.add(own, noise, alpha=step))
                    losses.append(float(self.loss(batch, torch.Generator().manual_seed(seed))))
            finally:
                weight.copy_(own)
            self.sums[layer.name] += abs(losses[0] - losses[1]) / (2 * EPSILON)

    def mean(self, name: str, n_batches: int) -> Tensor:
        """The mean of a layer over the batches, () float32."""
        mean = torch.tensor(self.sums[name] / n_batches)
        if not mean.isfinite():
            raise RuntimeError(f"the loss is not finite when layer {name} moves by {EPSILON}")
        return mean
