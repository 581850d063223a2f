"""Keeping a model sparse while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def masked_parameters(
    model: nn.Module, masks: Mapping[str, Tensor], layer_of: Callable[[str], str]
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """{parameter name: (parameter, its mask)} of the weights that masks cover, copies of pruned layers included.

    Args:
        model: with the parameters.
        masks: {layer name: bool (out, in)}, True = kept.
        layer_of: parameter name -> name of the layer whose mask it has.
    """
    return {
        name: (parameter, masks[layer_of(name)].to(parameter.device))
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and layer_of(name) in masks
    }


class KeptSparse:
    """Keeps pruned weights at zero while an optimizer moves the others.

    The gradient alone would not do: old momentum and weight decay move a weight without one. The step alone would not
    either: the gradients of dead weights would count in the clipped norm. The masks are held in the type of the weights
    (4 bytes an entry of float32), because a product with booleans takes four times as long on a CPU.

    Args:
        model: its pruned weights are zero already.
        masks: {layer name: bool (out, in)}, True = kept.
        layer_of: parameter name -> name of the layer whose mask it has.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], layer_of: Callable[[str], str]) -> None:
        masked = masked_parameters(model, masks, layer_of).values()
        self._masked = [(parameter, mask.to(parameter.dtype)) for parameter, mask in masked]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights, in place: after all backward passes of a step, before clipping."""
        for parameter, mask in self._masked:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Zeroes pruned weights, in place: after the step of the optimizer."""
        for parameter, mask in self._masked:
            parameter.mul_(mask)
