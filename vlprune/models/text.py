"""Words to ids: caption and question cleaning of ALBEF, X-VLM and BLIP, and padded WordPiece batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_DROPPED = re.compile(r"([,.'!?\"()*#:;~])")


def clean(text: str, max_words: int) -> str:
    """Lower-case words without punctuation, at most max_words of them; `-` and `/` separate words."""
    text = _DROPPED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:max_words])


@dataclass(frozen=True)
class Tokens:
    """Padded token ids (n, length) and which of them are no padding (n, length) bool."""

    ids: Tensor
    valid: Tensor

    def select(self, index: Tensor) -> Tokens:
        """The texts at index (k,), cut to the longest of them."""
        valid = self.valid[index]
        length = int(valid.sum(1).max())
        return Tokens(self.ids[index][:, :length], valid[:, :length])


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tokens:
    """Ids of different lengths as one right-padded batch."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        valid[i, : len(row)] = True
    return Tokens(ids, valid)


def word_ids(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_words: int, max_pieces: int
) -> list[list[int]]:
    """Piece ids of cleaned texts, at most max_pieces each, without special tokens."""
    cleaned = [clean(text, max_words) for text in texts]
    return [row[:max_pieces] for row in tokenizer(cleaned, add_special_tokens=False)["input_ids"]]
