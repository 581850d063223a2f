"""Additive attention masks and positions of padded and cached token batches."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.models.text import Tokens


def attention_bias(valid: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Additive attention mask (n, 1, 1, t) of valid positions (n, t); None where all are valid."""
    if valid is None:
        return None
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)[
        :, None, None
    ]


def causal_bias(tokens: Tokens, past: int) -> Tensor:
    """Additive causal mask (1, 1, length, past + length); padding is on the right, so causality hides it too."""
    length = tokens.ids.shape[1]
    hidden = torch.ones(length, past + length, dtype=torch.bool, device=tokens.ids.device).triu(past + 1)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, torch.finfo(torch.float32).min)[
        None, None
    ]


def positions(tokens: Tokens, past: int) -> Tensor:
    """Positions (1, length) of tokens that follow `past` others."""
    return torch.arange(past, past + tokens.ids.shape[1], device=tokens.ids.device)[None]
