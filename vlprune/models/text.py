"""Words to ids: caption and question cleaning of ALBEF, X-VLM and BLIP, and padded WordPiece batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_DROPPED = re.compile(r"([,.'!?\"()*#:;~])")


def clean(text: str, max_words: int) -> str:
    """Lower-case words without punctuation, at most max_words of them; `-` and `/` separate words."""
    text = _DROPPED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:max_words])


@dataclass(frozen=True)
class Tokens:
    """A padded batch of texts.

    Attributes:
        ids: token ids (n, length), padded on the right.
        attention_mask: (n, length) bool, False where a position is padding.
    """

    ids: Tensor
    attention_mask: Tensor

    def select(self, index: Tensor) -> Tokens:
        """The texts at positions index (k,), padded to the longest of them."""
        attention_mask = self.attention_mask[index]
        length = int(attention_mask.sum(1).max())
        return Tokens(self.ids[index][:, :length], attention_mask[:, :length])

    def widened(self, length: int) -> Tokens:
        """The texts with padding up to a length."""
        more = (0, length - self.ids.shape[1])
        return Tokens(F.pad(self.ids, more), F.pad(self.attention_mask, more))


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> Tokens:
    """Sequences of ids as one batch, padded on the right: [[2, 7], [2]] -> ids [[2, 7], [2, pad_id]]."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    attention_mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        attention_mask[i, : len(sequence)] = True
    return Tokens(ids, attention_mask)


def word_ids(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_words: int, max_pieces: int
) -> list[list[int]]:
    """Piece ids of cleaned texts, at most max_pieces of each, without special tokens."""
    cleaned = [clean(text, max_words) for text in texts]
    return [pieces[:max_pieces] for pieces in tokenizer(cleaned, add_special_tokens=False)["input_ids"]]
