"""WordPiece tokenizers: that of a model, and BERT's, which the official checkpoints use."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from vlprune import escapes

BERT = Path(__file__).parent / "bert_vocab.txt"
BLIP_TOKENS = ("[DEC]", "[ENC]")
FILES, BESIDE_VOCABULARY = ("tokenizer.json", "vocab.txt"), "tokenizer_config.json"


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The WordPiece tokenizer of a tokenizer.json or of a vocab.txt of BERT.

    A vocab.txt is taken for that of lower-case BERT unless a tokenizer_config.json beside it says otherwise.
    """
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"mask_token": "[MASK]"}
    if path.suffix == ".txt":
        beside = path.with_name(BESIDE_VOCABULARY)
        said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        pieces = BertWordPieceTokenizer(
            str(path),
            lowercase=said.get("do_lower_case", True),
            strip_accents=said.get("strip_accents"),
            handle_chinese_chars=said.get("tokenize_chinese_chars", True),
        )
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(pieces.to_str()), **special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    if there := [token for token in BLIP_TOKENS if token in tokenizer.get_vocab()]:
        tokenizer.add_special_tokens({"additional_special_tokens": there})
    return tokenizer


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory that its tokenizer is read from, the one for `load_tokenizer` first; possibly none."""
    there = [directory / name for name in FILES if (directory / name).is_file()][:1]
    beside = directory / BESIDE_VOCABULARY
    return [*there, beside] if there and there[0].suffix == ".txt" and beside.is_file() else there


def tokenizer_in(directory: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a directory; None where there is none.

    Raises:
        ValueError: its file is damaged.
    """
    files = tokenizer_files(directory)
    try:
        return load_tokenizer(files[0]) if files else None
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{files[0]} is no tokenizer: {escapes.reason(error)}") from None


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case BERT's WordPiece tokenizer, of the vocabulary that comes with this package."""
    return load_tokenizer(BERT)


def add_blip_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives a tokenizer, in place, BLIP's tokens [DEC] and [ENC] as its next two ids."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(BLIP_TOKENS)})
