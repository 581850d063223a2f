"""An X-VLM from a vision encoder with a class token and a BERT, each as transformers saves it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, BertForMaskedLM, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from vlprune.models.base import Config
from vlprune.models.checkpoints import build
from vlprune.models.fusion import MAX_WORDS
from vlprune.models.images import CLIP_MEAN, CLIP_STD, square
from vlprune.models.modeling_xvlm import CLIP, TextEncoder
from vlprune.models.tokenizer import FILES, load_tokenizer
from vlprune.models.xvlm import XVLM

Fusion = Literal["split", "top"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
# What the images of a family are normalised with and fitted by, where its directory does not say.
PREPROCESSING = {
    CLIP: {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_fit": "crop"},
    "dinov2": {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "image_fit": "crop"},
    "vit": {"image_mean": HALF, "image_std": HALF, "image_fit": "squash"},
}
# What of a transformers config says nothing about the shape of a model.
FORGOTTEN = ("_name_or_path", "architectures", "transformers_version", "dtype", "id2label", "label2id", "stage_names")


@dataclass(frozen=True)
class _Text:
    """A BERT: its settings, its weights under the names of BertForMaskedLM, and whether it had a masked-word head."""

    config: PreTrainedConfig
    state: Mapping[str, Tensor]
    has_head: bool


def from_encoders(
    vision_dir: str | Path,
    text_dir: str | Path,
    *,
    fusion_layers: int,
    fusion: Fusion = "split",
    image_size: int | None = None,
    **settings: Any,
) -> XVLM:
    """An X-VLM with the weights of two encoders and fresh cross-attention, projections and heads; see `XVLM`."""
    if fusion not in get_args(Fusion):
        raise ValueError(f"fusion must be one of {', '.join(get_args(Fusion))}, got {fusion!r}")
    with _quiet():
        encoder, text = _load_vision(vision_dir), _load_text(text_dir)
    depth = text.config.num_hidden_layers
    most = depth - 1 if fusion == "split" else depth
    if not 1 <= fusion_layers <= most:
        raise ValueError(
            f"fusion_layers must be from 1 to {most} to {fusion} the {depth} text layers of {text_dir}, "
            f"got {fusion_layers}"
        )
    if text.config.max_position_embeddings < MAX_WORDS:
        raise ValueError(
            f"the text encoder must take {MAX_WORDS} tokens, {text_dir} takes {text.config.max_position_embeddings}"
        )
    lower = depth - fusion_layers if fusion == "split" else depth
    tokenizer = load_tokenizer(_tokenizer_file(text_dir))
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "sep": "[SEP]"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(piece) for key, piece in pieces.items()}
    config: Config = {
        "family": "xvlm",
        "vision": _settings(encoder.config),
        "text": {**_settings(text.config), **ids, "num_hidden_layers": lower + fusion_layers},
        "fusion_layer": lower,
        "local_attn_depth": 0,
        **_preprocessing(vision_dir, encoder.config.model_type),
        **settings,
    }
    model = build(config, tokenizer)
    assert isinstance(model, XVLM)
    model.vision_model.load_state_dict(encoder.state_dict())
    _fill_text(model.text_encoder, text, depth - fusion_layers)
    if image_size is not None:
        model.resize_images(image_size)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """While inside, transformers does not list the poolers and heads that are left out or fresh, as they should be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_vision(where: str | Path) -> PreTrainedModel:
    """A vision encoder in float32, without its pooler, whose tokens are a class token and a square of patches."""
    config = AutoConfig.from_pretrained(where)
    if config.model_type in ("clip", CLIP):
        return CLIPVisionModel.from_pretrained(where, dtype=torch.float32)
    if config.model_type not in PREPROCESSING:
        raise ValueError(
            f"the vision encoder must have a class token and absolute positions ({', '.join(PREPROCESSING)}), "
            f"{where} holds a {config.model_type}"
        )
    pooler = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    return AutoModel.from_pretrained(where, dtype=torch.float32, **pooler)


def _load_text(where: str | Path) -> _Text:
    config = AutoConfig.from_pretrained(where)
    if config.model_type != "bert":
        raise ValueError(f"the text encoder must be a BERT, {where} holds a {config.model_type}")
    loaded: Any = BertForMaskedLM.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if absent := [name for name in missing if not name.startswith("cls.")]:
        raise ValueError(f"{where} lacks {len(absent)} weights of a BERT, e.g. {absent[0]}")
    has_head = "cls.predictions.transform.dense.weight" not in missing
    return _Text(config, model.state_dict(), has_head)


def _settings(config: PreTrainedConfig) -> Config:
    """A config as plain values, without what says nothing about the shape."""
    square(getattr(config, "image_size", 0))
    known = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in known.items() if key not in FORGOTTEN}


def _preprocessing(where: str | Path, family: str) -> Config:
    """How pictures become pixels: of preprocessor_config.json, or as usual in the family."""
    found = dict(PREPROCESSING[family])
    path = _file(where, "preprocessor_config.json")
    if path is not None:
        said = json.loads(path.read_text(encoding="utf-8"))
        found |= {key: said[key] for key in ("image_mean", "image_std") if key in said}
        if "do_center_crop" in said:
            found["image_fit"] = "crop" if said["do_center_crop"] else "squash"
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _tokenizer_file(where: str | Path) -> Path:
    _file(where, "tokenizer_config.json")  # of the hub: beside the vocabulary
    for name in FILES:
        if (path := _file(where, name)) is not None:
            return path
    raise FileNotFoundError(f"{where} has no tokenizer: wanted {' or '.join(FILES)}")


def _file(where: str | Path, name: str) -> Path | None:
    """A file of a directory or of a hub id; None where there is none."""
    found = cached_file(str(where), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _fill_text(encoder: TextEncoder, text: _Text, upper: int) -> None:
    """Writes BERT's weights into a text encoder, in place; layers beyond BERT's are copies of those from `upper` on."""
    depth = text.config.num_hidden_layers
    names = {"bert.embeddings.": "embeddings."} | {f"bert.encoder.layer.{i}.": f"layer.{i}." for i in range(depth)}
    moved = {}
    for old, tensor in text.state.items():
        for prefix, new in names.items():
            if old.startswith(prefix):
                moved[new + old.removeprefix(prefix)] = tensor
        if text.has_head and old.startswith("cls."):
            moved[old] = tensor
    for i in range(depth, len(encoder.layer)):
        source = f"layer.{upper + i - depth}."
        copies = {name: tensor for name, tensor in moved.items() if name.startswith(source)}
        moved |= {f"layer.{i}.{name.removeprefix(source)}": tensor for name, tensor in copies.items()}
    fresh = ("crossattention.",) if text.has_head else ("crossattention.", "cls.")
    absent, strange = encoder.load_state_dict(moved, strict=False)
    absent = [name for name in absent if not any(part in name for part in fresh)]
    if absent or strange:
        raise ValueError(f"the text encoder's weights do not fit: {', '.join([*absent, *strange][:3])}")
