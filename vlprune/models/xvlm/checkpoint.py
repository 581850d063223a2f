"""Checkpoints of X-VLM: official files, directories that transformers loads too, and the card of a model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlprune.models import official
from vlprune.models.base import Config
from vlprune.models.card import CardLines
from vlprune.models.directory import (
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
from vlprune.models.tokenizer import bert_tokenizer, tokenizer_in
from vlprune.models.xvlm import modeling_xvlm
from vlprune.models.xvlm.adapter import XVLM

NAMES = official.OfficialNames(
    tower="vision_encoder",
    prefixes=(
        ("vision_encoder.class_embedding", "vision_model.embeddings.class_embedding"),
        ("vision_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("vision_encoder.patch_embed", "vision_model.embeddings.patch_embedding"),
        ("vision_encoder", "vision_model"),
        ("text_encoder.bert.encoder.layer", "text_encoder.layer"),
        ("text_encoder.bert.embeddings", "text_encoder.embeddings"),
    ),
)
DECODER_STARTS_WITH = "[CLS]"
LOCAL_ATTENTION = 4  # layers of local attention where no config says how many, as in the released models


# ---- reading ----


def load(adapter: type[XVLM], source: str) -> XVLM:
    """The model of a directory or of an official checkpoint file; see `load_directory` and `load_official`."""
    path = Path(source)
    return load_official(path, adapter=adapter) if path.is_file() else load_directory(path, adapter)


def load_directory(path: Path, adapter: type[XVLM] = XVLM) -> XVLM:
    """The model of a directory that `save` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, weights are those of another model or not finite.
    """

    def config_of(stored: Config, _state: Mapping[str, Tensor]) -> Config:
        if "family" not in stored:
            raise ValueError(f"{path / 'config.json'} has no 'family' and settings, as X-VLMs that are saved here have")
        return own_settings(stored)

    config, state, tokenizer = read_directory(path, config_of)
    return filled(adapter, config, tokenizer, state, path, DECODER_STARTS_WITH)


def load_official(
    path: Path,
    heads: tuple[int, int] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    adapter: type[XVLM] = XVLM,
) -> XVLM:
    """The model of an official checkpoint with CLIP's vision encoder, in float32 and evaluation mode.

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
    if any(name.startswith("vision_model.layers.") for name in state):
        raise ValueError(f"{path} is an X-VLM with a Swin vision encoder; only that with CLIP's ViT can be read")
    config = config_beside(path, adapter.family)
    if config is None:
        with sizes_told(path):
            config = official_config(state, heads)
    tokenizer = tokenizer or tokenizer_in(path.parent) or bert_tokenizer()
    check_vocabulary(path, config, tokenizer)
    return filled(adapter, config, tokenizer, state, path, DECODER_STARTS_WITH)


def official_config(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> Config:
    """Settings of the X-VLM of a state dict in our names.

    Args:
        state: {our name: tensor}.
        heads: attention heads of vision and text; None: as many as are 64 wide.
    """
    embeddings, words = "vision_model.embeddings", "text_encoder.embeddings.word_embeddings.weight"
    positions = state[f"{embeddings}.position_embedding.weight"]
    vision = official.vision_config(state, positions, state[f"{embeddings}.patch_embedding.weight"], heads)
    text = official.text_config(state, "text_encoder", words, heads)
    fusion = [int(name.split(".")[2]) for name in state if ".crossattention.self.query.weight" in name]
    if not fusion:
        raise KeyError("text_encoder.layer.#.crossattention")
    return {
        "family": "xvlm",
        "vision": vision,
        "text": text,
        "local_attn_depth": min(LOCAL_ATTENTION, vision["num_hidden_layers"]),
        "fusion_layer": min(fusion),
        "embed_dim": len(state["vision_proj.weight"]),
    }


# ---- writing ----


def save(model: XVLM, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a directory that `load` reads, and `AutoModel.from_pretrained(path, trust_remote_code=True)` too.

    The directory brings the model's modules along.
    """
    remote = {"AutoConfig": "modeling_xvlm.XVLMConfig", "AutoModel": "modeling_xvlm.XVLMModel"}
    config = {"model_type": "xvlm", "architectures": ["XVLMModel"], "auto_map": remote, **model.config}
    write_directory(model, path, config, dtype)
    image_processor(model.image).save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    shutil.copyfile(modeling_xvlm.__file__, path / "modeling_xvlm.py")


# ---- the card ----

LOADING = """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

# modeling_xvlm.py in this directory needs torch and transformers alone.
model = AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)  # texts are [CLS] pieces, without [SEP]
images = AutoImageProcessor.from_pretrained(DIRECTORY, backend="pil")  # the other backend resizes otherwise"""
NOTE = (
    "`model(pixel_values, input_ids, attention_mask)` gives image and text features, fused states and matching logits."
)


def card_lines(_model: XVLM) -> CardLines:
    """What X-VLM says on the card of a model."""
    return CardLines("transformers", LOADING, NOTE)


FAMILY = Family(adapter=XVLM, load=load, save=save, fingerprint=files_fingerprint, card=card_lines, official=NAMES)
