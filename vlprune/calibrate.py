"""Statistics: what calibration batches tell about every layer, all of it in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from vlprune.batch import Batch
from vlprune.graph import LayerGraph

Statistics = dict[str, dict[str, Tensor]]
# Raised when the values of a statistic change, so that what was measured before is not read again.
STATISTICS_VERSION = 1
STATISTICS = ("input_sq", "grad", "grad_rows", "row_size")


class Calibrated(Protocol):
    """What calibration needs of a model."""

    @property
    def graph(self) -> LayerGraph: ...  # noqa: D102
    @property
    def valid(self) -> Mapping[str, Tensor | None]: ...  # noqa: D102
    @property
    def uses_regions(self) -> bool: ...  # noqa: D102
    @property
    def scored_losses(self) -> Sequence[str]: ...  # noqa: D102
    def weight(self, name: str) -> nn.Parameter: ...  # noqa: D102
    def get_submodule(self, target: str) -> nn.Module: ...  # noqa: D102
    def pretraining_losses(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]: ...  # noqa: D102
    def calibration_forward(self, batch: Batch) -> None: ...  # noqa: D102


def collect(model: Calibrated, batches: Iterable[Batch], needs: Set[str], seed: int = 0) -> Statistics:
    """Statistics of every layer of the model's graph; the model is as before.

    Args:
        model: a ModelAdapter in eval mode.
        batches: image-text pairs.
        needs: names of statistics:
            input_sq: (in,), sum of the squared valid inputs of each input node over the number of sequences.
            grad: (out, in), mean over the batches of the gradient of the summed pretraining losses.
            grad_rows: (n batches, out · in), the gradient of each batch.
            row_size: (), mean number of pairs and regions of a batch, the samples behind a row of `grad_rows`.
        seed: of what the losses draw, such as hard negatives and masked words.

    Raises:
        ValueError: an unknown statistic; no batches.
        RuntimeError: a layer that no input or no gradient reached; a value that is not finite.
    """
    if unknown := set(needs) - set(STATISTICS):
        raise ValueError(f"unknown statistics: {', '.join(sorted(unknown))}; there are: {', '.join(STATISTICS)}")
    layers = model.graph.layers
    weights = [model.weight(layer.name) for layer in layers]
    wants_grad = bool(needs & {"grad", "grad_rows"})
    inputs = _InputSquares(model)
    total = [torch.zeros_like(weight) for weight in weights] if "grad" in needs else []
    rows: list[list[Tensor]] = [[] for _ in layers]
    generator = torch.Generator().manual_seed(seed)
    n_batches = n_samples = 0
    with inputs.recorded() if "input_sq" in needs else nullcontext():
        for batch in batches:
            n_batches += 1
            n_samples += len(batch.images) + (len(batch.regions) if model.uses_regions else 0)
            if not wants_grad:
                with torch.no_grad():
                    model.calibration_forward(batch)
                continue
            losses = model.pretraining_losses(batch, generator)
            loss = torch.stack([losses[name] for name in model.scored_losses]).sum()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for i, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
                if gradient is None:
                    raise RuntimeError(f"layer {layer.name} has no part in the losses {', '.join(model.scored_losses)}")
                if not torch.isfinite(gradient).all():
                    raise RuntimeError(f"the gradient of layer {layer.name} is not finite in batch {n_batches - 1}")
                if "grad" in needs:
                    total[i] += gradient
                if "grad_rows" in needs:
                    rows[i].append(gradient.flatten())
    if n_batches == 0:
        raise ValueError("calibration needs at least one batch, got none")
    statistics: Statistics = {layer.name: {} for layer in layers}
    for i, layer in enumerate(layers):
        if "input_sq" in needs:
            statistics[layer.name]["input_sq"] = inputs.mean(layer.name)
        if "grad" in needs:
            statistics[layer.name]["grad"] = total[i] / n_batches
        if "grad_rows" in needs:
            statistics[layer.name]["grad_rows"] = torch.stack(rows[i])
        if "row_size" in needs:
            statistics[layer.name]["row_size"] = torch.tensor(n_samples / n_batches)
    return statistics


class _InputSquares:
    """Running sums of squared inputs, by forward pre-hooks."""

    def __init__(self, model: Calibrated) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.sequences: dict[str, int] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Hooks on every layer of the graph while inside, none afterwards."""
        handles = []
        try:
            for layer in self.model.graph:
                module = self.model.get_submodule(layer.name)
                handles.append(module.register_forward_pre_hook(self._hook(layer.name, layer.stream)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, stream: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if stream not in self.model.valid:
                return
            x, valid = args[0].detach(), self.model.valid[stream]
            # Float64 sums make the result independent of how the batches were cut, to float32.
            tokens = x.flatten(0, -2) if valid is None else x[valid]
            squares = tokens.square().sum(0).double()
            self.sums[name] = self.sums[name] + squares if name in self.sums else squares
            self.sequences[name] = self.sequences.get(name, 0) + len(x)

        return record

    def mean(self, name: str) -> Tensor:
        """Sum of squares of each input node over the number of sequences, (in,) float32."""
        if name not in self.sums:
            raise RuntimeError(f"no input reached layer {name}: its module never ran in a recorded pass")
        mean = (self.sums[name] / self.sequences[name]).float()
        if not torch.isfinite(mean).all():
            raise RuntimeError(f"the inputs of layer {name} are not finite")
        return mean


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes statistics as safetensors."""
    save_file({f"{name}:{kind}": t for name, kinds in statistics.items() for kind, t in kinds.items()}, path)


def load_statistics(path: Path, device: torch.device) -> Statistics:
    """The statistics of a file, on a device."""
    statistics: Statistics = {}
    for key, tensor in load_file(path, device=str(device)).items():
        name, kind = key.rsplit(":", 1)
        statistics.setdefault(name, {})[kind] = tensor
    return statistics
