"""Masks: which edges of a LayerGraph stay, applied, measured and compared."""

from __future__ import annotations

import hashlib
import logging
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from vlprune.graph import LayerGraph

# Raised when the weights of a model that masks are applied to come out otherwise, so that runs are made again.
VERSION = 1
SOME_ZEROS = 0.001  # a dense model has fewer exact zeros than this fraction of its weights
logger = logging.getLogger(__name__)


class Masks(dict[str, Tensor]):
    """{layer name: bool (out, in)}, True = kept.

    Attributes:
        weights: {layer name: (out, in)}, for a method that moves the surviving weights: their new values, and zeros
            elsewhere; else None.
        aliases: {layer name: names of the other modules that shared its weight in the pruned model}.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(masks)
        self.weights = None if weights is None else dict(weights)
        self.aliases = {name: tuple(others) for name, others in (aliases or {}).items()}

    def apply(self, model: nn.Module) -> None:
        """Changes any torch model in place: moved weights are written, then pruned ones become zero.

        A weight is found under the name of its layer and under its aliases; where the model does not share it, under
        each of them. A layer whose part (the first word of its name, such as `text_encoder`) the model does not have at
        all is left out with a warning.

        Raises:
            ValueError: a layer that the model's part lacks, a weight of another shape, no layer found; nothing has
                changed then.
        """
        found = self._parameters(model)
        if absent := [name for name, parameters in found.items() if not parameters]:
            parts = ", ".join(sorted({name.split(".")[0] for name in absent}))
            logger.warning("the masks of %d layers are left out: the model has no %s", len(absent), parts)
        with torch.no_grad():
            for name, parameters in found.items():
                for parameter in parameters:
                    if self.weights is not None:
                        parameter.copy_(self.weights[name])
                    parameter.masked_fill_(~self[name].to(parameter.device), 0.0)

    def _parameters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        parts = {name.split(".")[0] for name in parameters}
        found: dict[str, list[nn.Parameter]] = {}
        for name, mask in self.items():
            if self.weights is not None and (name not in self.weights or self.weights[name].shape != mask.shape):
                raise ValueError(f"layer '{name}': no moved weight of its mask's shape {tuple(mask.shape)}")
            names = (name, *self.aliases.get(name, ()))
            there = {f"{n}.weight": parameters[f"{n}.weight"] for n in names if f"{n}.weight" in parameters}
            expected = [n for n in names if n.split(".")[0] in parts]
            if len(there) < len(expected):
                missing = next(n for n in expected if f"{n}.weight" not in there)
                raise ValueError(f"the model has no weight {missing}.weight; it has: {reprlib.repr(list(parameters))}")
            for full, parameter in there.items():
                if parameter.shape != mask.shape:
                    shapes = tuple(parameter.shape), tuple(mask.shape)
                    raise ValueError(f"the model's {full} has shape {shapes[0]}, its mask {shapes[1]}")
            found[name] = list(there.values())
        if not any(found.values()):
            raise ValueError(f"the model has none of the masks' layers, such as {next(iter(self), 'none')!r}")
        return found


@runtime_checkable
class Prunable(Protocol):
    """A model with prunable layers."""

    @property
    def graph(self) -> LayerGraph:
        """The prunable layers."""
        ...

    def weight(self, name: str) -> nn.Parameter:
        """The weight (out, in) of a layer of the graph."""
        ...


def apply_masks(model: Prunable, masks: Masks) -> None:
    """Changes the model in place: `masks.weights`, if any, are written, then pruned weights become zero.

    Raises:
        ValueError: when the masks are not exactly those of the model's layers; nothing has changed then.
    """
    for what, tensors in (("mask", masks), ("weight", masks.weights)):
        if tensors is not None:
            check_fits(model.graph, what, tensors)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.weight(name)
            if masks.weights is not None:
                weight.copy_(masks.weights[name])
            weight.masked_fill_(~mask.to(weight.device), 0.0)


def sparsity(masks: Mapping[str, Bool[Tensor, "*_"]]) -> float:
    """The fraction of all entries of the masks that are pruned, in [0, 1)."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    return 1 - kept / sum(mask.numel() for mask in masks.values())


def measure(model: Prunable) -> float:
    """The fraction of a model's prunable weights that are exactly zero, whatever made them so."""
    kept = sum(int(torch.count_nonzero(model.weight(layer.name))) for layer in model.graph)
    return 1 - kept / model.graph.n_edges


def zeros_of(model: Prunable) -> dict[str, dict[str, Any]]:
    """What is zero in a model's prunable layers, whatever made it so, as plain values.

    Returns:
        {layer name: {"modality": its modality, "weights": their number, "zeros": how many of them are exactly zero}}.
    """
    return {
        layer.name: {
            "modality": layer.modality,
            "weights": layer.n_edges,
            "zeros": layer.n_edges - int(torch.count_nonzero(model.weight(layer.name))),
        }
        for layer in model.graph
    }


def already_sparse(model: Prunable) -> str | None:
    """A warning if more than SOME_ZEROS of the prunable weights are zero before any pruning, else None."""
    zeros = measure(model)
    if zeros <= SOME_ZEROS:
        return None
    return (
        f"{100 * zeros:.2f} % of the prunable weights are zero already: a sparsity is that of the masks, over all "
        "weights, and the model can end sparser"
    )


def overlap(a: Masks, b: Masks, modality: Mapping[str, str] | None = None) -> dict[str, float]:
    """Intersection over union of the kept entries of each layer; two masks that keep nothing overlap by 1.

    Args:
        a: masks.
        b: masks of the same layers.
        modality: {layer name: modality}, such as `LayerGraph.modality`; with it comes one value for each modality and
            one for "all".

    Returns:
        {layer name: overlap in [0, 1]}.

    Raises:
        ValueError: the masks are of different layers.
    """
    if a.keys() != b.keys():
        raise ValueError(f"masks of different layers, only in one of them: {sorted(a.keys() ^ b.keys())}")
    counts: dict[str, tuple[int, int]] = {}
    for name in a:
        counts[name] = (int((a[name] & b[name]).sum()), int((a[name] | b[name]).sum()))
    if modality is not None:
        groups = {group: [name for name in a if modality.get(name) == group] for group in modality.values()}
        for group, names in {**groups, "all": list(a)}.items():
            members = [counts[name] for name in names]
            counts[group] = (sum(both for both, _ in members), sum(either for _, either in members))
    return {name: both / either if either else 1.0 for name, (both, either) in counts.items()}


def pack_bits(mask: Bool[Tensor, "*_"]) -> UInt8[Tensor, " bytes"]:
    """The mask at one bit per entry, in row-major order: the first entry in the highest bit, zeros at the end."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_bits(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "*_"]:
    """The mask of that shape, the inverse of `pack_bits`."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def mask_hash(masks: Masks) -> str:
    """SHA-256 of names, shapes, bits and, where there are any, aliases and moved weights.

    The order of the layers does not count.
    """
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(" ".join((name, *masks.aliases.get(name, ()), f"{tuple(masks[name].shape)}\n")).encode())
        digest.update(pack_bits(masks[name]).numpy().data)
        if masks.weights is not None:
            weight = masks.weights[name].detach().cpu().contiguous()
            digest.update(f"{weight.dtype}\n".encode())
            digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_fits(graph: LayerGraph, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if the tensors, which `what` names, are not exactly those of the graph's layers."""
    wanted = {layer.name: layer.shape for layer in graph}
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise ValueError(f"the model has no prunable layers {unknown}; there are: {', '.join(wanted)}")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"no {what} for the layers {missing}; every prunable layer needs one")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(wanted[name]):
            raise ValueError(f"layer '{name}': {what} must have shape {wanted[name]}, got {tuple(tensor.shape)}")
