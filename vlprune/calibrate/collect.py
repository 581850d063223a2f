"""Statistics: what calibration batches tell about every layer, all of it in one pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from vlprune.batch import Batch
from vlprune.calibrate.inputs import Inputs, Recorded
from vlprune.calibrate.rows import Rows, WithRows
from vlprune.config import unknown
from vlprune.graph import BipartiteLayer, LayerGraph

Statistics = dict[str, Mapping[str, Tensor]]
# Raised when the values of a statistic change, so that what was measured before is not read again.
STATISTICS_VERSION = 2
STATISTICS = ("input_sq", "input_outer", "grad", "grad_sq", "grad_rows", "row_size", "zo_grad")
# Rows of gradients are too large for a cache: they are measured where they are needed.
UNCACHED = frozenset({"grad_rows", "row_size"})
INPUTS = frozenset({"input_sq", "input_outer"})
GRADIENTS = frozenset({"grad", "grad_sq", "grad_rows"})
ALIGNMENT = "itc"  # the loss that `alignment` weighs
EPSILON = 1e-3  # of the finite difference, as in Sung et al. 2024


class Calibrated(Recorded, Protocol):
    """What calibration needs of a model."""

    @property
    def graph(self) -> LayerGraph: ...  # noqa: D102
    @property
    def uses_regions(self) -> bool: ...  # noqa: D102
    @property
    def scored_losses(self) -> Sequence[str]: ...  # noqa: D102
    def weight(self, name: str) -> nn.Parameter: ...  # noqa: D102
    def pretraining_losses(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]: ...  # noqa: D102
    def calibration_forward(self, batch: Batch) -> None: ...  # noqa: D102


def collect(
    model: Calibrated,
    batches: Iterable[Batch],
    needs: Set[str],
    seed: int = 0,
    *,
    alignment: float = 1.0,
    layers: Collection[str] | None = None,
    rows: Rows | None = None,
) -> Statistics:
    """Statistics of the layers of the model's graph; the model is as before.

    Sums run batch by batch, so that memory does not grow with their number, except for `grad_rows`.
    On a CPU the last bits of gradients depend on the number of threads; those of the inputs did not in our tests.

    Args:
        model: a ModelAdapter in eval mode.
        batches: image-text pairs.
        needs: names of statistics:
            input_sq: (in,), sum of the squared valid inputs of each input node over the number of sequences.
            input_outer: (in, in), the same of the products of two inputs; input_sq is its diagonal.
            grad: (out, in), mean over the batches of the gradient of the loss.
            grad_sq: (out, in), mean over the batches of the squared gradient.
            grad_rows: (n batches, out · in), the gradient of each batch.
            row_size: (), mean number of pairs and regions of a batch, the samples behind a row of `grad_rows`.
            zo_grad: (), mean over the batches of |L(W + eps z) − L(W − eps z)| / (2 eps) with noise z ~ N(0, 1) on this
                layer alone and eps 1e-3, a gradient without backward passes (Sung et al. 2024, arXiv:2310.02998).
        seed: of what the losses draw, such as hard negatives and masked words, and of the noise.
        alignment: weight of the ITC loss in the sum of the model's pretraining losses that is differentiated.
        layers: names of those to measure; None: all.
        rows: where `grad_rows` are kept; None: in memory up to a limit, then in the system's temporary directory.

    Raises:
        ValueError: an unknown statistic or layer; no batches; an alignment for a model without that loss.
        RuntimeError: a layer that no input or no gradient reached; a value that is not finite.
    """
    for name in sorted(set(needs) - set(STATISTICS)):
        raise ValueError(unknown("statistic", name, STATISTICS))
    measured = _layers(model.graph, layers)
    loss = _Loss(model, alignment)
    inputs = Inputs(model, measured, outer="input_outer" in needs)
    gradients = _Gradients([(layer.name, model.weight(layer.name)) for layer in measured], needs, rows)
    noise = _ZerothOrder(model, measured, loss, seed)
    generator = torch.Generator().manual_seed(seed)
    n_batches = n_samples = 0
    with inputs.hooked() if needs & INPUTS else nullcontext():
        for batch in batches:
            n_samples += len(batch.images) + (len(batch.regions) if model.uses_regions else 0)
            inputs.active = True
            if needs & GRADIENTS:
                gradients.add(loss(batch, generator), n_batches)
            elif needs & INPUTS:
                with torch.no_grad():
                    model.calibration_forward(batch)
            inputs.active = False
            inputs.add()
            if "zo_grad" in needs:
                noise.add(batch)
            n_batches += 1
    if n_batches == 0:
        raise ValueError("calibration needs at least one batch, got none")
    statistics: Statistics = {}
    for layer in measured:
        own = gradients.means(layer.name, n_batches)
        if needs & INPUTS:
            own |= {kind: mean for kind, mean in inputs.means(layer.name).items() if kind in needs}
        if "row_size" in needs:
            own["row_size"] = torch.tensor(n_samples / n_batches)
        if "zo_grad" in needs:
            own["zo_grad"] = noise.mean(layer.name, n_batches)
        statistics[layer.name] = WithRows(own, gradients.rows, layer.name) if "grad_rows" in needs else own
    return statistics


def _layers(graph: LayerGraph, names: Collection[str] | None) -> list[BipartiteLayer]:
    known = [layer.name for layer in graph]
    for name in sorted(set(names or ()) - set(known)):
        raise ValueError(unknown("layer", name, known))
    return [layer for layer in graph if names is None or layer.name in names]


class _Loss:
    """The weighted sum of the pretraining losses of a batch."""

    def __init__(self, model: Calibrated, alignment: float) -> None:
        if alignment != 1 and ALIGNMENT not in model.scored_losses:
            there = ", ".join(model.scored_losses)
            raise ValueError(f"alignment weighs the loss {ALIGNMENT!r}, which the model does not have; it has: {there}")
        self.model = model
        self.weights = {name: alignment if name == ALIGNMENT else 1.0 for name in model.scored_losses}

    def __call__(self, batch: Batch, generator: Generator) -> Tensor:
        losses = self.model.pretraining_losses(batch, generator)
        return torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()


class _Gradients:
    """Running sums of gradients, and the rows they are."""

    def __init__(self, weights: Sequence[tuple[str, Tensor]], needs: Set[str], rows: Rows | None) -> None:
        self.names, self.weights = [name for name, _ in weights], [weight for _, weight in weights]
        self.sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("grad", "grad_sq") if kind in needs}
        self.rows = rows or Rows()
        self.keeps_rows = "grad_rows" in needs

    def add(self, loss: Tensor, batch: int) -> None:
        """Adds the gradients of a batch's loss."""
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
        """{statistic: (out, in)}; once for each layer."""
        means = {kind: sums[name].div_(n_batches).contiguous() for kind, sums in self.sums.items()}
        for mean in means.values():
            _check_gradient(name, mean)
        return means


def _check_gradient(name: str, gradient: Tensor, where: str = "") -> None:
    # A sum is not finite where an entry is not, and takes a fraction of the time of a test of every entry.
    if not gradient.sum().isfinite():
        raise RuntimeError(f"the gradient of layer {name} is not finite{where}")


class _ZerothOrder:
    """Finite differences of the loss along noise on one layer at a time."""

    def __init__(self, model: Calibrated, layers: Sequence[BipartiteLayer], loss: _Loss, seed: int) -> None:
        self.model, self.layers, self.loss = model, layers, loss
        self.seeds = torch.Generator().manual_seed(seed)
        self.sums = dict.fromkeys((layer.name for layer in layers), 0.0)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Adds the differences of a batch: two losses a layer, with equal draws."""
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
        """() float32."""
        mean = torch.tensor(self.sums[name] / n_batches)
        if not mean.isfinite():
            raise RuntimeError(f"the loss is not finite when layer {name} moves by {EPSILON}")
        return mean


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes statistics as safetensors."""
    save_file({f"{name}:{kind}": t for name, kinds in statistics.items() for kind, t in kinds.items()}, path)


def load_statistics(path: Path, device: torch.device) -> Statistics:
    """The statistics of a file, on a device."""
    statistics: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path, device=str(device)).items():
        name, kind = key.rsplit(":", 1)
        statistics.setdefault(name, {})[kind] = tensor
    return dict(statistics)
