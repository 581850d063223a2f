"""The number format that products are computed in: fp32, tf32 or bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlprune.config import Precision


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """A context in which a model's products of matrices and convolutions are computed in a number format.

    Args:
        precision: "fp32"; "tf32", which rounds factors to 10 bits of mantissa on the CUDA devices that can and is fp32
            elsewhere; or "bf16", torch's autocast, which rounds factors and products to 7 bits.
        device: where the model is.
    """
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        for setting, own in zip(settings, before, strict=True):
            setting.fp32_precision = own
