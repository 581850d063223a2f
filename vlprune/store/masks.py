"""Mask bundles: masks as a file, one bit per edge, with where they come from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlprune import escapes
from vlprune.masks import Masks, mask_hash, pack_bits, unpack_bits
from vlprune.store.atomic import atomic
from vlprune.store.documents import parse_json
from vlprune.store.tensors import check_header

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
        check_header(Path(path))
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata())
            shapes, aliases = _shapes(header["shapes"]), _aliases(header.get("aliases", "{}"))
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            moved = any(name.startswith("weight.") for name in sizes)
            wanted = {f"mask.{name}": ((math.prod(shape) + 7) // 8,) for name, shape in shapes.items()}
            wanted |= {f"weight.{name}": shape for name, shape in shapes.items()} if moved else {}
            if sizes != wanted:
                raise ValueError("its tensors are not of the names and shapes that its header says")
            weights = {name: file.get_tensor(f"weight.{name}") for name in shapes} if moved else None
            bits = {name: unpack_bits(file.get_tensor(f"mask.{name}"), shape) for name, shape in shapes.items()}
        masks = Masks(bits, weights, aliases)
        if mask_hash(masks) != header["hash"]:
            raise ValueError("its hash does not match its content")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an intact mask bundle: {escapes.reason(error)}") from error
    return masks


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    """{layer name: shape} of a header."""
    shapes = {name: tuple(shape) for name, shape in parse_json(text, "its list of shapes").items()}
    if not all(type(size) is int and size > 0 for shape in shapes.values() for size in shape):
        raise ValueError("its header has sizes that are none")
    return shapes


def _aliases(text: str) -> dict[str, tuple[str, ...]]:
    """{layer name: other names} of a header."""
    aliases = {name: tuple(others) for name, others in parse_json(text, "its list of aliases").items()}
    if not all(isinstance(other, str) for others in aliases.values() for other in others):
        raise ValueError("its header has names that are none")
    return aliases


def load_provenance(path: str | os.PathLike[str]) -> dict[str, str]:
    """Where the masks of a bundle come from, read from its header alone; errors as in `load_masks`."""
    try:
        check_header(Path(path))
        with safe_open(path, framework="pt") as file:
            found = parse_json(_header(file.metadata())["provenance"], "its provenance")
        if not isinstance(found, dict):
            raise ValueError("its provenance is none")
        return found
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not an intact mask bundle: {escapes.reason(error)}") from error


def _header(metadata: dict[str, str] | None) -> dict[str, str]:
    found = (metadata or {}).get("format")
    if found != _FORMAT:
        raise ValueError(f"its format is {found!r}, not {_FORMAT!r}")
    return metadata or {}
