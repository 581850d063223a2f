"""Official checkpoints of BLIP and X-VLM: their names and ours, and the settings that their shapes tell.

The names are those of the reference code of MULTIFLOW (FarinaMatteo/multiflow at 1835f1b), whose BLIP is the original
and whose X-VLM has a CLIP vision encoder.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.models.base import Config
from vlprune.models.blip import PRETRAINING

SUFFIXES = (".pth", ".pt", ".bin")
# What an official name begins with and what ours does; # is a number. The first that fits counts.
PREFIXES = {
    "blip": (
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual_encoder.blocks.#.norm#", "vision_model.encoder.layers.#.layer_norm#"),
        ("visual_encoder.blocks.#.attn.qkv", "vision_model.encoder.layers.#.self_attn.qkv"),
        ("visual_encoder.blocks.#.attn.proj", "vision_model.encoder.layers.#.self_attn.projection"),
        ("visual_encoder.blocks.#.mlp", "vision_model.encoder.layers.#.mlp"),
        ("visual_encoder.norm", "vision_model.post_layernorm"),
    ),
    "xvlm": (
        ("vision_encoder.class_embedding", "vision_model.embeddings.class_embedding"),
        ("vision_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("vision_encoder.patch_embed", "vision_model.embeddings.patch_embedding"),
        ("vision_encoder", "vision_model"),
        ("text_encoder.bert.encoder.layer", "text_encoder.layer"),
        ("text_encoder.bert.embeddings", "text_encoder.embeddings"),
    ),
}
# Momentum copies, queues and positions, which the weights do not need.
IGNORED = re.compile(r"_m\.|^(image|text|idx)_queue$|^(queue_)?ptr(_queue)?$|position_ids$")
HEAD_WIDTH = 64  # of every released ViT and BERT of these families


def official_to_ours(family: str, name: str) -> str:
    """Our name of what an official checkpoint calls `name`."""
    return _rename(name, PREFIXES[family])


def ours_to_official(family: str, name: str) -> str:
    """The official name of what we call `name`."""
    return _rename(name, [(ours, official) for official, ours in PREFIXES[family]])


def _rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        found = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)", name)
        if found:
            for number in found.groups():
                new = new.replace("#", number, 1)
            return new + name[found.end() :]
    return name


def read_official(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(family, {our name: float32 tensor}) of an official checkpoint, without momentum copies and queues.

    The file holds the state itself, or under "model" or "state_dict"; only tensors and plain values are unpickled.

    Raises:
        ValueError: a damaged file, one with other objects than tensors, weights of another model.
    """
    state = unpickle(path)
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(is_entry(name, value) for name, value in state.items()):
        raise ValueError(f"{path} holds no state dict of tensors, directly or under 'model' or 'state_dict'")
    names = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    family = _family(path, names)
    weights = {name: tensor for name, tensor in names.items() if not IGNORED.search(name)}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} must hold floating-point weights, got {tensor.dtype}")
    return family, {official_to_ours(family, name): tensor.float() for name, tensor in weights.items()}


def is_entry(name: object, value: object) -> bool:
    """Whether these are a name and a tensor, as a state dict has them."""
    return isinstance(name, str) and isinstance(value, Tensor)


def unpickle(path: Path) -> Any:
    """What torch saved in a file, on the CPU.

    Raises:
        ValueError: a damaged file, or objects that are neither tensors nor plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values{refused(error)}") from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged: {str(error).splitlines()[0] if str(error) else 'it ends early'}"
        ) from None


def refused(error: pickle.UnpicklingError) -> str:
    """What torch names as not unpickled, after a colon; empty where it names nothing."""
    found = re.search(r"(?:GLOBAL|global: (?!GLOBAL)) *([\w.]+)", str(error))
    return f": {found[1]}" if found else ""


def _family(path: Path, names: Iterable[str]) -> str:
    starts = {name.split(".")[0] for name in names}
    if any(name.startswith("vision_encoder.layers.") for name in names):
        raise ValueError(f"{path} is an X-VLM with a Swin vision encoder; only that with CLIP's ViT can be read")
    for family, top in (("blip", "visual_encoder"), ("xvlm", "vision_encoder")):
        if top in starts:
            return family
    raise ValueError(
        f"{path} is neither BLIP (visual_encoder.…) nor X-VLM (vision_encoder.…); its names begin with: "
        f"{', '.join(sorted(starts))}"
    )


def blip_config(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> Config:
    """Settings of the BLIP of a state in our names.

    Args:
        state: {our name: tensor}; its parts say what the model was trained for.
        heads: attention heads of vision and text; None: as many as are 64 wide.
    """
    parts = {name.split(".")[0] for name in state}
    text = "text_encoder.encoder" if "text_encoder" in parts else "text_decoder.bert.encoder"
    embeddings = f"{text.removesuffix('encoder')}embeddings.word_embeddings.weight"
    vision = "vision_model.embeddings"
    positions = state[f"{vision}.position_embedding"][0]
    vision_config = _vision(state, positions, state[f"{vision}.patch_embedding.weight"], heads)
    text_config = _text(state, text, embeddings, heads)
    text_config |= {
        "encoder_hidden_size": vision_config["hidden_size"],
        "label_smoothing": 0.1,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    config: Config = {"family": "blip", "vision": {**vision_config, "layer_norm_eps": 1e-6}, "text": text_config}
    config["trained_for"] = trained_for(parts)
    if "vision_proj" in parts:
        config["embed_dim"] = len(state["vision_proj.weight"])
    return config


def trained_for(parts: Iterable[str]) -> str:
    """What a BLIP with these parts (first words of its names) was trained for."""
    encoder, decoder, matches = (part in set(parts) for part in ("text_encoder", "text_decoder", "itm_head"))
    if matches:
        return PRETRAINING if decoder else "retrieval"
    return "vqa" if encoder else "captioning"


def xvlm_config(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> Config:
    """Settings of the X-VLM of a state in our names; arguments as of `blip_config`."""
    vision = "vision_model.embeddings"
    config: Config = {"family": "xvlm"}
    positions = state[f"{vision}.position_embedding.weight"]
    config["vision"] = _vision(state, positions, state[f"{vision}.patch_embedding.weight"], heads)
    config["text"] = _text(state, "text_encoder", "text_encoder.embeddings.word_embeddings.weight", heads)
    fusion = [int(name.split(".")[2]) for name in state if ".crossattention.self.query.weight" in name]
    config["local_attn_depth"] = min(4, config["vision"]["num_hidden_layers"])
    if not fusion:
        raise KeyError("text_encoder.layer.#.crossattention")
    config["fusion_layer"], config["embed_dim"] = min(fusion), len(state["vision_proj.weight"])
    return config


def _vision(
    state: Mapping[str, Tensor], positions: Tensor, patches: Tensor, heads: tuple[int, int] | None
) -> dict[str, Any]:
    width, patch = positions.shape[1], patches.shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": len(state["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": _count(state, "vision_model.encoder.layers"),
        "num_attention_heads": heads[0] if heads else _heads(width, "vision"),
        "image_size": round((len(positions) - 1) ** 0.5) * patch,
        "patch_size": patch,
    }


def _text(state: Mapping[str, Tensor], layers: str, embeddings: str, heads: tuple[int, int] | None) -> dict[str, Any]:
    vocabulary, width = state[embeddings].shape
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{layers}.layer.0.intermediate.dense.bias"]),
        "num_hidden_layers": _count(state, f"{layers}.layer"),
        "num_attention_heads": heads[1] if heads else _heads(width, "text"),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state[embeddings.replace("word", "position")]),
    }


def _count(state: Mapping[str, Tensor], layers: str) -> int:
    return 1 + max(
        int(name.removeprefix(f"{layers}.").split(".")[0]) for name in state if name.startswith(f"{layers}.")
    )


def _heads(width: int, tower: str) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"the number of {tower} attention heads is not in a state dict, and width {width} is no multiple of "
            f"{HEAD_WIDTH}: put a config.json beside the checkpoint, or give `heads`"
        )
    return width // HEAD_WIDTH
