"""Checkpoints of BLIP: official files, directories of transformers' and of this project, and the card of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipProcessor, PreTrainedTokenizerFast

from vlprune.models import official
from vlprune.models.base import Config
from vlprune.models.blip.adapter import BLIP, CAPTIONING, PRETRAINING, RETRIEVAL, VQA
from vlprune.models.card import CardLines
from vlprune.models.directory import (
    OURS,
    check_vocabulary,
    config_beside,
    files_fingerprint,
    filled,
    image_processor,
    own_settings,
    read_directory,
    sizes_told,
    write_directory,
)
from vlprune.models.family import Family
from vlprune.models.tokenizer import BLIP_TOKENS, add_blip_tokens, bert_tokenizer, tokenizer_in

NAMES = official.OfficialNames(
    tower="visual_encoder",
    prefixes=(
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual_encoder.blocks.#.norm#", "vision_model.encoder.layers.#.layer_norm#"),
        ("visual_encoder.blocks.#.attn.qkv", "vision_model.encoder.layers.#.self_attn.qkv"),
        ("visual_encoder.blocks.#.attn.proj", "vision_model.encoder.layers.#.self_attn.projection"),
        ("visual_encoder.blocks.#.mlp", "vision_model.encoder.layers.#.mlp"),
        ("visual_encoder.norm", "vision_model.post_layernorm"),
    ),
    momentum={
        "visual_encoder": "visual_encoder_m",
        "text_encoder": "text_encoder_m",
        "vision_proj": "vision_proj_m",
        "text_proj": "text_proj_m",
    },
)
# The classes of transformers that hold a model, by what it is used for.
CLASSES = {
    RETRIEVAL: "BlipForImageTextRetrieval",
    CAPTIONING: "BlipForConditionalGeneration",
    VQA: "BlipForQuestionAnswering",
}
DECODER_STARTS_WITH = "[DEC]"


# ---- reading ----


def load(adapter: type[BLIP], source: str) -> BLIP:
    """The model of a directory or of an official checkpoint file; see `load_directory` and `load_official`."""
    path = Path(source)
    return load_official(path, adapter=adapter) if path.is_file() else load_directory(path, adapter)


def load_directory(path: Path, adapter: type[BLIP] = BLIP) -> BLIP:
    """The model of a directory: one that `save` wrote, or a BLIP of transformers.

    A BLIP of transformers for one task becomes a model of that task alone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, weights are those of another model or not finite.
    """
    config, state, tokenizer = read_directory(path, _config_of)
    _complete(tokenizer, config)
    return filled(adapter, config, tokenizer, state, path, DECODER_STARTS_WITH)


def load_official(
    path: Path,
    heads: tuple[int, int] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    adapter: type[BLIP] = BLIP,
) -> BLIP:
    """The model of an official checkpoint, in float32 and evaluation mode.

    Sizes come from the shapes of the weights; a config.json with a "family" beside the file goes before them. The
    tokenizer is lower-case BERT's, or that of a tokenizer.json or vocab.txt beside the file.

    Args:
        path: a .pth file, read with `weights_only=True`.
        heads: attention heads of vision and text; None: as many as are 64 wide, as in every released model.
        tokenizer: the tokenizer; None: as said above.
        adapter: class of the model.

    Raises:
        ValueError: the file is damaged, weights are those of another model, the tokenizer has another vocabulary.
    """
    state = official.read_official(path, NAMES)
    config = config_beside(path, adapter.family)
    if config is None:
        with sizes_told(path):
            config = official_config(state, heads)
    if tokenizer is None:
        tokenizer = tokenizer_in(path.parent)
    if tokenizer is None:
        tokenizer = bert_tokenizer()
        add_blip_tokens(tokenizer)
    _complete(tokenizer, config)
    check_vocabulary(path, config, tokenizer)
    return filled(adapter, config, tokenizer, state, path, DECODER_STARTS_WITH)


def _config_of(stored: Config, state: Mapping[str, Tensor]) -> Config:
    """Our settings from those of a config.json."""
    if "family" in stored:
        return own_settings(stored)
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
        "trained_for": trained_for({name.split(".")[0] for name in state}),
    }


def _complete(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Gives a tokenizer, in place, [DEC] and [ENC], which that of transformers' BLIP has not, though its model has."""
    missing = [token for token in BLIP_TOKENS if token not in tokenizer.get_vocab()]
    if missing and len(tokenizer) + len(missing) == config["text"]["vocab_size"]:
        add_blip_tokens(tokenizer)


def official_config(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> Config:
    """Settings of the BLIP of a state dict in our names.

    Args:
        state: {our name: tensor}; its parts say what the model was trained for.
        heads: attention heads of vision and text; None: as many as are 64 wide.
    """
    parts = {name.split(".")[0] for name in state}
    layers = "text_encoder.encoder" if "text_encoder" in parts else "text_decoder.bert.encoder"
    words = f"{layers.removesuffix('encoder')}embeddings.word_embeddings.weight"
    embeddings = "vision_model.embeddings"
    positions = state[f"{embeddings}.position_embedding"][0]
    vision = official.vision_config(state, positions, state[f"{embeddings}.patch_embedding.weight"], heads)
    text = official.text_config(state, layers, words, heads) | {
        "encoder_hidden_size": vision["hidden_size"],
        "label_smoothing": 0.1,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    config: Config = {"family": "blip", "vision": {**vision, "layer_norm_eps": 1e-6}, "text": text}
    config["trained_for"] = trained_for(parts)
    if "vision_proj" in parts:
        config["embed_dim"] = len(state["vision_proj.weight"])
    return config


def trained_for(parts: Collection[str]) -> str:
    """What a BLIP was trained for, from the first words of its names, such as {"vision_model", "text_decoder"}."""
    if "itm_head" in parts:
        return PRETRAINING if "text_decoder" in parts else RETRIEVAL
    return VQA if "text_encoder" in parts else CAPTIONING


# ---- writing ----


def save(model: BLIP, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a directory that `load` and plain transformers read, there by the classes that `classes_of` names."""
    write_directory(model, path, _transformers_config(model), dtype)
    BlipProcessor(image_processor(model.image), model.tokenizer).save_pretrained(path)


def _transformers_config(model: BLIP) -> Config:
    config = dict(model.config)
    vision, text = config.pop("vision"), config.pop("text")
    embed_dim = config.setdefault("embed_dim", 256)
    used_for = RETRIEVAL if config.setdefault("trained_for", PRETRAINING) == PRETRAINING else config["trained_for"]
    return {
        "model_type": "blip",
        "architectures": [CLASSES[used_for]],
        "projection_dim": embed_dim,
        "image_text_hidden_size": embed_dim,
        "vision_config": {**vision, "model_type": "blip_vision_model"},
        "text_config": {**text, "model_type": "blip_text_model"},
        OURS: config,
    }


def classes_of(model: BLIP) -> list[str]:
    """The names of the classes of transformers that hold the model; none where it loads with this project alone.

    The answer decoder of transformers reads states of questions with keys as wide as images are, so that models whose
    images and texts differ in width do not fit BlipForQuestionAnswering.
    """
    uses = list(CLASSES) if model.trained_for == PRETRAINING else [model.trained_for]
    return [CLASSES[use] for use in uses if use != VQA or model.image_width == model.text_width]


# ---- the card ----

LOADING = """from transformers import AutoImageProcessor, AutoTokenizer, {first}

model = {first}.from_pretrained(DIRECTORY){others}
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
images = AutoImageProcessor.from_pretrained(DIRECTORY, backend="pil")  # the other backend resizes otherwise"""
LOADING_HERE = """import vlprune

# transformers' BlipForQuestionAnswering cannot hold images and texts of different widths.
model = vlprune.load_model(DIRECTORY)"""
NOTE = (
    "Texts that look at an image begin with the token [ENC], captions and answers with [DEC], as in BLIP's own "
    "code; transformers leaves that to the caller, and its report names the parts that a class does not use. "
    "Its answer decoder does not see which tokens of a question are padding: ask questions of equal length together."
)


def card_lines(model: BLIP) -> CardLines:
    """What BLIP says on the card of a model."""
    if classes := classes_of(model):
        others = f"  # or {', '.join(classes[1:])}" if classes[1:] else ""
        return CardLines("transformers", LOADING.format(first=classes[0], others=others), NOTE)
    return CardLines("transformers", LOADING_HERE, NOTE)


FAMILY = Family(adapter=BLIP, load=load, save=save, fingerprint=files_fingerprint, card=card_lines, official=NAMES)
