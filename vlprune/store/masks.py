"""Mask bundles: masks as a file, one bit per edge, with where they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlprune.masks import Masks, mask_hash, pack_bits, unpack_bits
from vlprune.store.atomic import atomic

_FORMAT = "vlprune-masks-1"


def save_masks(path: str | os.PathLike[str], masks: Masks, provenance: Mapping[str, str]) -> None:
    """Writes a mask bundle, a safetensors file, atomically: a reader sees the old file or the whole new one.

    Masks take one bit per edge, moved weights are stored in full; the header holds order, shapes and aliases of the
    layers, the hash of the masks and their provenance.

    Args:
        path: the file.
        masks: what to write.
        provenance: where the masks come from, such as {"method": "omp", "model": "tiny-blip"}.
    """
    tensors = {f"mask.{name}": pack_bits(mask) for name, mask in masks.items()}
    for name, weight in (masks.weights or {}).items():
        tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
    header = {
        "format": _FORMAT,
        "aliases": json.dumps(masks.aliases),
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "provenance": json.dumps(dict(provenance)),
        "hash": mask_hash(masks),
    }
    with atomic(Path(path)) as half:
        save_file(tensors, half, metadata=header)


def load_masks(path: str | os.PathLike[str]) -> Masks:
    """The masks of a bundle, checked against its hash.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is no mask bundle or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata())
            names = set(file.keys())
            shapes = {name: tuple(shape) for name, shape in json.loads(header["shapes"]).items()}
            weights = None
            if any(name.startswith("weight.") for name in names):
                weights = {name: file.get_tensor(f"weight.{name}") for name in shapes}
            bits = {name: unpack_bits(file.get_tensor(f"mask.{name}"), shape) for name, shape in shapes.items()}
        masks = Masks(bits, weights, json.loads(header.get("aliases", "{}")))
        if mask_hash(masks) != header["hash"]:
            raise ValueError("its hash does not match its content")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an intact mask bundle: {error}") from error
    return masks


def load_provenance(path: str | os.PathLike[str]) -> dict[str, str]:
    """Where the masks of a bundle come from, read from its header alone; errors as in `load_masks`."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(_header(file.metadata())["provenance"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not an intact mask bundle: {error}") from error


def _header(metadata: dict[str, str] | None) -> dict[str, str]:
    found = (metadata or {}).get("format")
    if found != _FORMAT:
        raise ValueError(f"its format is {found!r}, not {_FORMAT!r}")
    return metadata or {}
