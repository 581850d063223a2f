"""Masks in the files of the reference code of MULTIFLOW (FarinaMatteo/multiflow at 1835f1b), read and written."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from vlprune import escapes
from vlprune.masks import Masks, check_fits
from vlprune.models.base import ModelAdapter
from vlprune.models.official import OfficialNames
from vlprune.models.registry import get_family
from vlprune.store.atomic import atomic
from vlprune.store.tensors import tensors_in, unpickle

WEIGHT, BIAS = ".weight_pruning_mask", ".bias_pruning_mask"


def import_masks(path: str | os.PathLike[str], model: ModelAdapter) -> Masks:
    """The masks of a model that the reference code saved as `*_pruning_masks.pth`.

    The file has a mask, bool or 0 and 1, for the weight and the bias of every linear module; those outside the graph
    must be ones. A tied weight may be there once or under each of its names.

    Raises:
        ValueError: the file is damaged, holds other values than 0 and 1, masks of another model, or prunes biases or
            heads.
    """
    path = Path(path)
    state = tensors_in(path, unpickle(path), f"{path} is no dict of masks")
    official = _names_of(model)
    names = {alias: layer.name for layer in model.graph for alias in (layer.name, *layer.aliases)}
    masks: dict[str, Tensor] = {}
    shapes = {layer.name: layer.shape for layer in model.graph}
    for full, values in state.items():
        name, _, kind = full.rpartition(".")
        if f".{kind}" not in (WEIGHT, BIAS):
            raise ValueError(f"{path}: wanted names that end with {WEIGHT} or {BIAS}, got {full}")
        layer = names.get(official.to_ours(name)) if f".{kind}" == WEIGHT else None
        if layer is not None and tuple(values.shape) != shapes[layer]:
            raise ValueError(f"{path}: {full} has shape {tuple(values.shape)}, wanted {shapes[layer]}")
        mask = values != 0
        if not torch.equal(mask.to(values.dtype), values):
            raise ValueError(f"{path}: {full} must hold 0 and 1 alone")
        if layer is None:
            if not mask.all():
                raise ValueError(f"{path}: {full} prunes what is not prunable in {model.family}")
        elif layer in masks and not torch.equal(masks[layer], mask):
            raise ValueError(f"{path}: {full} differs from the mask of the same weight under another name")
        else:
            masks[layer] = mask
    try:
        check_fits(model.graph, "mask", masks)
    except ValueError as error:
        raise ValueError(f"{path}: {escapes.reason(error)}") from None
    return Masks({layer.name: masks[layer.name] for layer in model.graph}, aliases=model.graph.aliases)


def export_masks(masks: Masks, model: ModelAdapter, path: str | os.PathLike[str]) -> None:
    """Writes masks as the reference code does: bool, under official names, ones for what is never pruned.

    New values of weights that a method moves are not in such a file; they are in the model.

    Raises:
        ValueError: the masks are those of another model, or the reference code has no models of the family.
    """
    check_fits(model.graph, "mask", masks)
    names = _names_of(model)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            official = names.to_official(name)
            kept = masks[name].cpu() if name in masks else torch.ones(module.weight.shape, dtype=torch.bool)
            state[official + WEIGHT] = kept
            if module.bias is not None:
                state[official + BIAS] = torch.ones(module.bias.shape, dtype=torch.bool)
    for full in list(state):
        top, _, rest = full.partition(".")
        # The reference masks momentum copies too, with ones.
        if top in names.momentum:
            state[f"{names.momentum[top]}.{rest}"] = torch.ones_like(state[full])
    with atomic(Path(path)) as half:
        torch.save(state, half)


def _names_of(model: ModelAdapter) -> OfficialNames:
    names = get_family(model.family).official
    if names is None:
        raise ValueError(f"the reference code has no mask files of {model.family}")
    return names
