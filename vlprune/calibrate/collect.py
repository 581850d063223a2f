"""Collecting statistics: what calibration batches tell about every layer, all of it in one pass over them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from vlprune.batch import Batch
from vlprune.calibrate.differences import Differences
from vlprune.calibrate.gradients import Gradients, Loss
from vlprune.calibrate.inputs import Inputs, Recorded
from vlprune.calibrate.rows import Rows, WithRows
from vlprune.config import unknown
from vlprune.graph import BipartiteLayer, LayerGraph
from vlprune.statistics import STATISTICS

Statistics = dict[str, Mapping[str, Tensor]]
# Raised when the values of a statistic change, so that what was measured before is not read again.
STATISTICS_VERSION = 2
INPUTS = frozenset({"input_sq", "input_outer"})
GRADIENTS = frozenset({"grad", "grad_sq", "grad_rows"})


class Calibrated(Recorded, Protocol):
    """What calibration needs of a model."""

    @property
    def graph(self) -> LayerGraph: ...  # noqa: D102
    @property
    def scored_losses(self) -> Sequence[str]: ...  # noqa: D102
    def n_samples(self, batch: Batch) -> int: ...  # noqa: D102
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
    """Statistics of the layers of a model's graph, {layer name: {statistic: tensor}}; the model is as before.

    Sums grow batch by batch, so that memory does not grow with the number of batches, except for `grad_rows`. What is
    measured of a statistic does not depend on which others are measured with it. On a CPU the last bits of gradients
    depend on the number of threads; those of the inputs did not in our tests.

    Args:
        model: a ModelAdapter in evaluation mode.
        batches: the calibration data, batches of image-text pairs.
        needs: names of the statistics to measure, for a layer with a weight (out, in):
            input_sq: (in,), the sum of the squared inputs of each input node over the positions that the attention mask
                leaves, divided by the number of sequences.
            input_outer: (in, in), the same for the products of the inputs of two nodes; input_sq is its diagonal.
            grad: (out, in), the gradient of the loss, mean over the batches.
            grad_sq: (out, in), the squared gradient of each batch, mean over the batches.
            grad_rows: (n batches, out · in), the gradient of each batch as a row.
            row_size: (), the mean number of samples (pairs, and regions that the losses look at) behind a gradient row.
            zo_grad: (), |L(W + eps z) − L(W − eps z)| / (2 eps), mean over the batches, with noise z ~ N(0, 1) on this
                layer alone and eps 1e-3: a derivative without backward passes (Sung et al. 2024, arXiv:2310.02998).
        seed: seeds the random choices of the losses, such as hard negatives and masked words, and the noise.
        alignment: weight of the ITC loss in the sum of the model's pretraining losses that is differentiated.
        layers: names of the layers to measure (None: all).
        rows: the store of the gradient rows (None: in memory up to a limit, then in the system's directory for
            temporary files).

    Raises:
        ValueError: an unknown statistic or layer; no batches; an alignment for a model without that loss.
        RuntimeError: a layer that no input or no gradient reached; a value that is not finite.
    """
    for name in sorted(set(needs) - set(STATISTICS)):
        raise ValueError(unknown("statistic", name, STATISTICS))
    measured = _layers(model.graph, layers)
    loss = Loss(model, alignment)
    inputs = Inputs(model, measured, outer="input_outer" in needs)
    gradients = Gradients([(layer.name, model.weight(layer.name)) for layer in measured], needs, rows)
    noise = Differences(model, measured, loss, seed)
    generator = torch.Generator().manual_seed(seed)
    n_batches = n_samples = 0
    with inputs.hooked() if needs & INPUTS else nullcontext():
        for batch in batches:
            n_samples += model.n_samples(batch)
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


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes statistics as a safetensors file, each tensor under "layer name:statistic"."""
    save_file({f"{name}:{kind}": t for name, kinds in statistics.items() for kind, t in kinds.items()}, path)


def load_statistics(path: Path, device: torch.device) -> Statistics:
    """The statistics of a file of `save_statistics`, on a device."""
    statistics: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path, device=str(device)).items():
        name, kind = key.rsplit(":", 1)
        statistics.setdefault(name, {})[kind] = tensor
    return dict(statistics)
