"""Directories and files that hold a model: written so that transformers loads them, read from wherever they come."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
)

from vlprune.models import modeling_xvlm, official
from vlprune.models.base import Config
from vlprune.models.blip import BLIP, PRETRAINING
from vlprune.models.fusion import FusionAdapter
from vlprune.models.state import SAFETENSORS, fill, names_of, read_state
from vlprune.models.tokenizer import BLIP_TOKENS, FILES, bert_tokenizer, load_tokenizer
from vlprune.models.xvlm import XVLM
from vlprune.store.atomic import atomic

FAMILIES: dict[str, type[FusionAdapter]] = {"blip": BLIP, "xvlm": XVLM}
ARCHITECTURES = {
    PRETRAINING: "BlipForImageTextRetrieval",
    "retrieval": "BlipForImageTextRetrieval",
    "captioning": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
}
OURS = "vlprune"  # the key of a transformers config that holds what transformers does not know of
TRANSFORMERS = ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "tie_word_embeddings")
WEIGHTS = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt")


def build(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> FusionAdapter:
    """An adapter with fresh weights.

    Args:
        config: {"family": a key of FAMILIES, "vision": {...}, "text": {...}} in transformers' words, and the arguments
            of the family's adapter.
        tokenizer: WordPiece with [CLS], [SEP], [MASK], and for BLIP [DEC] and [ENC].

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


# ---- reading ----


def load_directory(path: Path) -> FusionAdapter:
    """The adapter of a directory, in float32 and eval mode: of `save_directory`, or a BLIP of transformers.

    A BLIP of transformers for one task becomes a model of that task alone.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a damaged file, weights of another model, weights that are not finite.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"a model directory holds config.json, weights and tokenizer.json; {path} has no config.json"
        )
    stored, state = _read_config(path / "config.json"), read_state(path)
    config = _config(path, stored, state)
    tokenizer = _tokenizer_in(path)
    if tokenizer is None:
        raise FileNotFoundError(f"a model directory holds {' or '.join(FILES)}; {path} has neither")
    if config["family"] == "blip":
        _add_blip_tokens(tokenizer, config)
    return _filled(config, tokenizer, {name: t for name, t in state.items() if not official.IGNORED.search(name)}, path)


def load_official(
    path: Path, heads: tuple[int, int] | None = None, tokenizer: PreTrainedTokenizerFast | None = None
) -> FusionAdapter:
    """The adapter of an official BLIP or X-VLM checkpoint, in float32 and eval mode.

    Sizes come from the shapes; a `config.json` with a "family" beside the file, as `save_directory` writes, goes before
    them. The tokenizer is lower-case BERT's, or that of a tokenizer.json or vocab.txt beside the file.

    Args:
        path: of a .pth file, read with `weights_only=True`.
        heads: attention heads of vision and text; None: as many as are 64 wide, as in every released model.
        tokenizer: another one than those.

    Raises:
        ValueError: a damaged file, weights of another model, a tokenizer of another vocabulary.
    """
    family, state = official.read_official(path)
    beside = path.parent / "config.json"
    stored = _read_config(beside) if beside.is_file() else {}
    if stored.get("family") == family:
        config: Config = {key: value for key, value in stored.items() if key not in TRANSFORMERS}
    else:
        try:
            config = (official.blip_config if family == "blip" else official.xvlm_config)(state, heads)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{path} is of another model, its sizes cannot be told: {error}") from None
    tokenizer = tokenizer or _tokenizer_in(path.parent) or bert_tokenizer(family)
    if family == "blip":
        _add_blip_tokens(tokenizer, config)
    size = config["text"]["vocab_size"]
    if len(tokenizer) != size:
        raise ValueError(
            f"{path} has a vocabulary of {size}, the tokenizer of {len(tokenizer)}; put its tokenizer.json beside it"
        )
    return _filled(config, tokenizer, state, path)


def _filled(config: Config, tokenizer: PreTrainedTokenizerFast, state: dict[str, Any], where: Path) -> FusionAdapter:
    text = dict(config["text"])
    ids = {"pad": "[PAD]", "sep": "[SEP]", "eos": "[SEP]", "bos": "[DEC]" if config["family"] == "blip" else "[CLS]"}
    for key, token in ids.items():
        text.setdefault(f"{key}_token_id", tokenizer.convert_tokens_to_ids(token))
    model = build({**config, "text": text}, tokenizer)
    fill(model, state, where)
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(stored, dict) or ("family" in stored and not {"vision", "text"} <= stored.keys()):
        raise ValueError(f"{path} must hold the settings of a model, with 'vision' and 'text' beside a 'family'")
    return stored


def _config(path: Path, stored: dict[str, Any], state: dict[str, Any]) -> Config:
    """Our settings from those of a file."""
    if "family" in stored:
        return {key: value for key, value in stored.items() if key not in TRANSFORMERS}
    kind = stored.get("model_type")
    if kind != "blip":
        raise ValueError(
            f"{path / 'config.json'}: wanted a model of vlprune or a BLIP of transformers, got model_type {kind!r}"
        )
    if OURS in stored:
        parts = {name: {**stored[f"{name}_config"]} for name in ("vision", "text")}
        for part in parts.values():
            del part["model_type"]
        return {**stored[OURS], **parts}
    blip: Any = BlipConfig.from_dict(stored)
    return {
        "family": "blip",
        "vision": blip.vision_config.to_diff_dict(),
        "text": blip.text_config.to_diff_dict() | {"encoder_hidden_size": blip.vision_config.hidden_size},
        "embed_dim": blip.image_text_hidden_size,
        "trained_for": official.trained_for({name.split(".")[0] for name in state}),
    }


def _tokenizer_in(directory: Path) -> PreTrainedTokenizerFast | None:
    there = [directory / name for name in FILES if (directory / name).is_file()]
    try:
        return load_tokenizer(there[0]) if there else None
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{there[0]} is no tokenizer: {error}") from None


def _add_blip_tokens(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Gives a tokenizer, in place, [DEC] and [ENC], which that of transformers' BLIP has not, though its model has."""
    missing = [token for token in BLIP_TOKENS if token not in tokenizer.get_vocab()]
    if missing and len(tokenizer) + len(missing) == config["text"]["vocab_size"]:
        tokenizer.add_special_tokens({"additional_special_tokens": list(BLIP_TOKENS)})


# ---- writing ----


def save_directory(model: FusionAdapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a model so that `load_directory` and plain transformers load it.

    A BLIP loads as BlipForImageTextRetrieval, BlipForConditionalGeneration or BlipForQuestionAnswering, those of its
    tasks, which know no ties: tied tensors are there under every name. An X-VLM brings its modules along and loads with
    `AutoModel.from_pretrained(path, trust_remote_code=True)`.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = _transformers_config(model)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _processor(model, path)
    if model.family == "xvlm":
        shutil.copyfile(modeling_xvlm.__file__, path / "modeling_xvlm.py")
    state = {}
    for parameter, names in names_of(model):
        for name in names:
            state[name] = parameter.detach().to(dtype, copy=name != names[0]).contiguous()
    with atomic(path / SAFETENSORS) as part:
        save_file(state, part, metadata={"format": "pt"})


def _transformers_config(model: FusionAdapter) -> dict[str, Any]:
    config = dict(model.config)
    if model.family != "blip":
        remote = {"AutoConfig": "modeling_xvlm.XVLMConfig", "AutoModel": "modeling_xvlm.XVLMModel"}
        return {"model_type": "xvlm", "architectures": ["XVLMModel"], "auto_map": remote, **config}
    vision, text = config.pop("vision"), config.pop("text")
    embed_dim = config.setdefault("embed_dim", 256)
    return {
        "model_type": "blip",
        "architectures": [ARCHITECTURES[config.setdefault("trained_for", PRETRAINING)]],
        "projection_dim": embed_dim,
        "image_text_hidden_size": embed_dim,
        "vision_config": {**vision, "model_type": "blip_vision_model"},
        "text_config": {**text, "model_type": "blip_text_model"},
        OURS: config,
    }


def _processor(model: FusionAdapter, path: Path) -> None:
    """Writes the tokenizer and the image settings of transformers."""
    image = asdict(model.image)
    size, fit = image.pop("size"), image.pop("fit")
    normalise = {"image_mean": list(image["mean"]), "image_std": list(image["std"]), "resample": 3}
    if fit == "squash":
        pictures = BlipImageProcessor(size={"height": size, "width": size}, **normalise)
    else:
        crop = {"height": size, "width": size}
        pictures = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop, **normalise)
    if model.family == "blip":
        BlipProcessor(pictures, model.tokenizer).save_pretrained(path)
    else:
        pictures.save_pretrained(path)
        model.tokenizer.save_pretrained(path)


def digest(path: Path) -> str:
    """Short hash of a model file, or of everything in a model directory that its outputs depend on."""
    sha = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in WEIGHTS)
    for file in files:
        sha.update(f"{file.name}\n".encode())
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]
