"""Keeping a model sparse while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

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


@contextmanager
def kept_sparse(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor], layer_of: Callable[[str], str]
) -> Iterator[None]:
    """While inside, gradients of pruned weights are zero, and so are the weights after every optimizer step.

    The gradient alone would not do: old momentum and weight decay move a weight without one. The step alone would not
    either: the gradients of dead weights would count in the clipped norm.
    """
    masked = list(masked_parameters(model, masks, layer_of).values())

    def zero_pruned(*_: object) -> None:
        with torch.no_grad():
            for parameter, mask in masked:
                parameter.mul_(mask)

    handles = []
    try:
        for parameter, mask in masked:
            handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
        handles.append(optimizer.register_step_post_hook(zero_pruned))
        yield
    finally:
        for handle in handles:
            handle.remove()
