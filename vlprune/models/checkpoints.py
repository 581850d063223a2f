"""Directories that hold one adapter: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from vlprune.models.blip import BLIP
from vlprune.models.fusion import FusionAdapter
from vlprune.models.xvlm import XVLM

FAMILIES: dict[str, type[FusionAdapter]] = {"blip": BLIP, "xvlm": XVLM}
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def build(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> FusionAdapter:
    """An adapter with fresh weights.

    Args:
        config: {"family": a key of FAMILIES, "vision": {...}, "text": {...}} in transformers' words, and the arguments
            of the family's adapter.
        tokenizer: WordPiece with [CLS], [SEP], [MASK], [DEC] and [ENC].

    Raises:
        ValueError: an unknown family.
    """
    family = config.get("family")
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; there are: {', '.join(FAMILIES)}")
    rest = {key: value for key, value in config.items() if key != "family"}
    model = FAMILIES[family](tokenizer, **rest)
    model.config = dict(config)
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The WordPiece of a tokenizer.json."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=["[DEC]", "[ENC]"],
    )


def load_directory(path: Path) -> FusionAdapter:
    """The adapter saved in a directory, in float32 and eval mode.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a damaged file, weights of another model, weights that are not finite.
    """
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"a model directory holds {', '.join(FILES)}; {path} lacks {', '.join(missing)}")
    model = build(json.loads((path / "config.json").read_text()), load_tokenizer(path / "tokenizer.json"))
    try:
        state = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    except SafetensorError as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged: {error}") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path / 'model.safetensors'}: {name} holds NaN or infinite weights")
    wanted = unique_state(model)
    if differing := {*wanted} ^ {*state}:
        raise ValueError(
            f"{path / 'model.safetensors'} is of another model: {len(differing)} names differ, e.g. {min(differing)}"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, wanted {tuple(wanted[name].shape)}")
    with torch.no_grad():
        for name, tensor in state.items():
            wanted[name].copy_(tensor)
    return model.eval()


def save_directory(model: FusionAdapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the adapter and the config it was built from; tied tensors once."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    model.tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in unique_state(model).items()}
    part = path / "model.safetensors.part"
    save_file(state, part, metadata={"format": "pt"})
    os.replace(part, path / "model.safetensors")


def unique_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by their first name: of tied ones only that."""
    return dict(model.named_parameters())


def digest(path: Path) -> str:
    """Short hash of everything in a model directory that its outputs depend on."""
    sha = hashlib.sha256()
    for name in FILES:
        sha.update((path / name).read_bytes())
    return sha.hexdigest()[:16]
