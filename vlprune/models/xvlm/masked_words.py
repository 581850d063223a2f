"""Masked words: which words masked language modelling hides and what it shows in their place."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerFast

from vlprune.models.text import Tokens

PROBABILITY = 0.25
MOST = 8  # pieces of a text


def mask_words(tokens: Tokens, tokenizer: PreTrainedTokenizerFast, generator: Generator) -> tuple[Tensor, Tensor]:
    """Ids (n, length) after masking whole words, and the positions (n, length) bool that were chosen for it.

    Chosen are a quarter of each text's words, at least one and at most eight pieces, never the first token. A chosen
    piece becomes [MASK] in 80 %, a random one in 10 % and stays in 10 % of the cases.

    Args:
        tokens: the texts.
        tokenizer: says which pieces continue a word.
        generator: makes all random choices.
    """
    ids = tokens.ids
    inner, mask = _pieces(tokenizer)
    word = (~inner.to(ids.device)[ids]).long().cumsum(1) - 1
    chance = torch.rand(ids.shape, generator=generator).to(ids.device).gather(1, word)
    chance = chance.masked_fill(~tokens.attention_mask, 2.0)
    chance[:, 0] = 2.0
    rank = chance.argsort(1).argsort(1)
    chosen = ((chance < PROBABILITY) & (rank < MOST)) | ((rank == 0) & (chance < 2.0))
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
