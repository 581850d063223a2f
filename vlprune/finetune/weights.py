"""Fine-tuned weights as a file: of pruned weights only those that stay, with one bit a weight to say which."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlprune.finetune.sparse import masked_parameters
from vlprune.masks import pack_bits, unpack_bits


def save_sparse(path: Path, model: nn.Module, masks: Mapping[str, Tensor], layer_of: Callable[[str], str]) -> None:
    """Writes a model's state as safetensors: kept values and masks of pruned weights, everything else in full.

    A tensor that several names share is there once.

    Args:
        path: the file.
        model: its pruned weights are zero.
        masks: {layer name: bool (out, in)}, True = kept.
        layer_of: parameter name -> name of the layer whose mask it has.
    """
    masked = masked_parameters(model, masks, layer_of)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, value in model.state_dict().items():
        owner = first.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
        if owner != name:
            aliases[name] = owner
        elif name in masked:
            tensors[f"kept.{name}"] = value[masked[name][1]].cpu()
        else:
            tensors[f"full.{name}"] = value.detach().cpu().contiguous()
    layers = sorted({layer_of(name) for name in masked})
    tensors |= {f"mask.{layer}": pack_bits(masks[layer]) for layer in layers}
    header = {
        "aliases": json.dumps(aliases),
        "layers": json.dumps({name: layer_of(name) for name in masked}),
        "shapes": json.dumps({layer: list(masks[layer].shape) for layer in layers}),
    }
    save_file(tensors, path, metadata=header)


def load_sparse(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict and the masks of a file of `save_sparse`, on the CPU, bit-identical to those that were saved.

    Raises:
        SafetensorError: the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = {key: json.loads(text) for key, text in file.metadata().items()}
        masks = {
            layer: unpack_bits(file.get_tensor(f"mask.{layer}"), tuple(shape))
            for layer, shape in header["shapes"].items()
        }
        state: dict[str, Tensor] = {}
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(".")
            if kind == "full":
                state[name] = file.get_tensor(key)
            elif kind == "kept":
                mask, values = masks[header["layers"][name]], file.get_tensor(key)
                state[name] = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
    return {**state, **{name: state[owner] for name, owner in header["aliases"].items()}}, masks
