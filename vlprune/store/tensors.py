"""Files of tensors that others wrote, safetensors and what torch saved: nothing is allocated that is not in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from errno import EINVAL
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlprune import escapes

# Bytes of the names and shapes in a file; those of a model of a thousand tensors are 100 KB.
MOST_NAMES = 4 << 20
LONGEST = 500  # characters of a name


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file, or of a dict of tensors that torch saved, on the CPU as they are stored.

    The tensors are mapped from the file where its format allows that, hence not in memory before they are used.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    if path.suffix != ".safetensors":
        return tensors_in(path, unpickle(path), f"{path} holds no dict of tensors")
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {escapes.reason(error)}") from None
    return tensors_in(path, found, f"{path} holds no tensors")


def check_header(path: Path) -> None:
    """Refuses a safetensors file of more names than a model has.

    Raises:
        ValueError: its header claims more than MOST_NAMES bytes.
        FileNotFoundError: there is no file.
    """
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > MOST_NAMES:
        raise ValueError(f"{path} is damaged: its names and shapes take {claimed:,} bytes, at most {MOST_NAMES:,} do")


def unpickle(path: Path) -> Any:
    """What torch saved in a file, only tensors and plain values, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds other objects.
    """
    try:
        if mapped := is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises nearly anything
        if isinstance(error, OSError) and error.errno != EINVAL:  # of the disk; that one is of a place before the file
            raise
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values{_reason(error)}") from None


def _check_archive(path: Path) -> None:
    """Refuses archives that torch does not write: compressed, or with more names than a model has."""
    with ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != ZIP_STORED:
                raise ValueError("its parts are compressed")
            if record.filename.endswith("data.pkl") and record.file_size > MOST_NAMES:
                raise ValueError(f"its names and shapes take {record.file_size:,} bytes, at most {MOST_NAMES:,} do")


def _reason(error: Exception) -> str:
    """What was not unpickled, or why, after a colon; none of torch's advice to unpickle it all the same."""
    refused = re.search(r"(?:GLOBAL|global: (?!GLOBAL)) *([\w.]+)", str(error))
    said = refused[1] if refused else escapes.reason(error)
    return "" if "weights_only" in said else f": {said}"


def tensors_in(where: object, value: Any, otherwise: str) -> dict[str, Tensor]:
    """{name: tensor} of what should be such a dict, all tensors dense and no larger than what is stored of them.

    Args:
        where: the file, for errors.
        value: what the file holds.
        otherwise: what is said of anything else.

    Raises:
        ValueError: something else, a name that cannot be shown, or a tensor that repeats what is stored, is sparse,
            quantised or without content.
    """
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    ):
        raise ValueError(otherwise)
    for name, tensor in value.items():
        if not name.isprintable() or len(name) > LONGEST:
            raise ValueError(f"{where}: {escapes.terminal(name)[:LONGEST]} is no name of a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{where}: {name} must be a dense tensor of real numbers")
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() > stored:
            raise ValueError(f"{where}: {name} claims {tensor.numel():,} numbers, {stored:,} are stored")
    return dict(value)
