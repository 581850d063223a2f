"""Additive attention masks and positions of padded and cached token batches."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.models.text import Tokens


def additive_mask(attention_mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The additive form (n, 1, 1, t) of an attention mask (n, t) bool: 0 where it is True, else the lowest number.

    None, which stands for a mask without padding, stays None.
    """
    if attention_mask is None:
        return None
    zeros = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return zeros.masked_fill(~attention_mask, torch.finfo(dtype).min)[:, None, None]


def causal_mask(tokens: Tokens, past: int) -> Tensor:
    """Additive causal mask (1, 1, length, past + length); padding is on the right, so causality hides it too."""
    length = tokens.ids.shape[1]
    hidden = torch.ones(length, past + length, dtype=torch.bool, device=tokens.ids.device).triu(past + 1)
    zeros = torch.zeros(hidden.shape, device=hidden.device)
    return zeros.masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


def positions(tokens: Tokens, past: int) -> Tensor:
    """Positions (1, length) of tokens that follow `past` others."""
    return torch.arange(past, past + tokens.ids.shape[1], device=tokens.ids.device)[None]
