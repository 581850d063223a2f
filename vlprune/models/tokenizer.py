"""WordPiece tokenizers: that of a model, and BERT's, which the official checkpoints use."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

BERT = Path(__file__).parent / "bert_vocab.txt"
BLIP_TOKENS = ("[DEC]", "[ENC]")
FILES = ("tokenizer.json", "vocab.txt")


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The WordPiece of a tokenizer.json, or of a vocab.txt of BERT.

    A vocab.txt is of lower-case BERT unless a tokenizer_config.json beside it says otherwise, and gets BLIP's tokens
    [DEC] and [ENC] as its next ids only from `bert_tokenizer`.
    """
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"mask_token": "[MASK]"}
    if path.suffix == ".txt":
        beside = path.with_name("tokenizer_config.json")
        said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        pieces = BertWordPieceTokenizer(
            str(path),
            lowercase=said.get("do_lower_case", True),
            strip_accents=said.get("strip_accents"),
            handle_chinese_chars=said.get("tokenize_chinese_chars", True),
        )
        return PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    if there := [token for token in BLIP_TOKENS if token in tokenizer.get_vocab()]:
        tokenizer.add_special_tokens({"additional_special_tokens": there})
    return tokenizer


def bert_tokenizer(family: str, vocabulary: Path = BERT) -> PreTrainedTokenizerFast:
    """Lower-case BERT's WordPiece; for BLIP with [DEC] and [ENC] as the next two ids."""
    tokenizer = load_tokenizer(vocabulary)
    if family == "blip":
        tokenizer.add_special_tokens({"additional_special_tokens": list(BLIP_TOKENS)})
    return tokenizer
