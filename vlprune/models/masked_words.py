"""Masked words: what masked language modelling reads and has to say, whole words at a time."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerFast

from vlprune.models.text import Tokens

PROBABILITY = 0.25
MOST = 8  # pieces of a text


def mask_words(tokens: Tokens, tokenizer: PreTrainedTokenizerFast, generator: Generator) -> tuple[Tensor, Tensor]:
    """Ids after masking whole words and (n, length) bool, what was chosen: 80 % [MASK], 10 % random, 10 % kept.

    A quarter of each text's words, at least one and at most eight pieces, never the first token.
    """
    ids = tokens.ids
    inner, mask = _pieces(tokenizer)
    word = (~inner.to(ids.device)[ids]).long().cumsum(1) - 1
    draws = torch.rand(ids.shape, generator=generator).to(ids.device).gather(1, word)
    draws = draws.masked_fill(~tokens.valid, 2.0)
    draws[:, 0] = 2.0
    ranked = draws.argsort(1).argsort(1)
    chosen = ((draws < PROBABILITY) & (ranked < MOST)) | ((ranked == 0) & (draws < 2.0))
    fate = torch.rand(ids.shape, generator=generator).to(ids.device)
    random = torch.randint(len(inner), ids.shape, generator=generator).to(ids.device)
    replaced = torch.where(fate < 0.8, mask, torch.where(fate < 0.9, random, ids))
    return torch.where(chosen, replaced, ids), chosen


@lru_cache(maxsize=8)
def _pieces(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, int]:
    """Which pieces continue a word (vocabulary,) bool, and the id of [MASK]."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    mask = tokenizer.convert_tokens_to_ids("[MASK]")
    assert isinstance(mask, int)
    return torch.tensor([str(piece).startswith("##") for piece in pieces]), mask
