"""A vision encoder with a class token and a BERT, each as transformers saves it, as the parts of an X-VLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vlprune.models.base import Config
from vlprune.models.images import CLIP_MEAN, CLIP_STD, square
from vlprune.models.tokenizer import BESIDE_VOCABULARY, FILES, load_tokenizer
from vlprune.models.transformers_internals import file_of, no_load_reports
from vlprune.models.xvlm.modeling_xvlm import CLIP, TextEncoder

Fusion = Literal["split", "top"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
# How pictures become pixels in a family of encoders, where a directory does not say.
PREPROCESSING = {
    CLIP: {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_fit": "crop"},
    "dinov2": {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "image_fit": "crop"},
    "vit": {"image_mean": HALF, "image_std": HALF, "image_fit": "squash"},
}
# Keys of a config of transformers that say nothing about the shape of a model.
FORGOTTEN = ("_name_or_path", "architectures", "transformers_version", "dtype", "id2label", "label2id", "stage_names")


@dataclass(frozen=True)
class _Text:
    """A BERT: its settings, its weights under the names of BertForMaskedLM, and whether it had a masked-word head."""

    config: PreTrainedConfig
    state: Mapping[str, Tensor]
    has_head: bool


@dataclass(frozen=True)
class Encoders:
    """A vision encoder and a BERT, as an X-VLM is made of them.

    Attributes:
        config: settings of the X-VLM, as `FusionAdapter.from_config` takes them, without its family.
        tokenizer: the BERT's.
        vision: the vision encoder's weights under its own names.
        text: the BERT.
        upper: number of the BERT's layer that the first layer beyond the BERT's own is a copy of.
    """

    config: Config
    tokenizer: PreTrainedTokenizerFast
    vision: Mapping[str, Tensor]
    text: _Text
    upper: int

    def fill_text(self, encoder: TextEncoder) -> None:
        """Writes the BERT's weights into the text encoder of an X-VLM, in place; further layers are copies of its."""
        _fill_text(encoder, self.text, self.upper)


def read_encoders(
    vision_dir: str | Path, text_dir: str | Path, *, fusion_layers: int, fusion: Fusion, min_length: int
) -> Encoders:
    """Reads the parts that `XVLM.from_encoders` makes a model of.

    Args:
        vision_dir: directory or hub id of the vision encoder.
        text_dir: directory or hub id of the BERT with its tokenizer.
        fusion_layers: number of text layers that look at the image.
        fusion: "split" or "top"; see `XVLM.from_encoders`.
        min_length: number of tokens that the BERT must take.

    Raises:
        ValueError: what `XVLM.from_encoders` refuses.
    """
    if fusion not in get_args(Fusion):
        raise ValueError(f"fusion must be one of {', '.join(get_args(Fusion))}, got {fusion!r}")
    # Poolers and heads are left out or fresh, as they should be.
    with no_load_reports():
        encoder, text = _load_vision(vision_dir), _load_text(text_dir)
    depth = text.config.num_hidden_layers
    most = depth - 1 if fusion == "split" else depth
    if not 1 <= fusion_layers <= most:
        raise ValueError(
            f"fusion_layers must be from 1 to {most} to {fusion} the {depth} text layers of {text_dir}, "
            f"got {fusion_layers}"
        )
    if text.config.max_position_embeddings < min_length:
        raise ValueError(
            f"the text encoder must take {min_length} tokens, {text_dir} takes {text.config.max_position_embeddings}"
        )
    lower = depth - fusion_layers if fusion == "split" else depth
    tokenizer = load_tokenizer(_tokenizer_file(text_dir))
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "sep": "[SEP]"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(piece) for key, piece in pieces.items()}
    config: Config = {
        "vision": _settings(encoder.config),
        "text": {**_settings(text.config), **ids, "num_hidden_layers": lower + fusion_layers},
        "fusion_layer": lower,
        "local_attn_depth": 0,
        **_preprocessing(vision_dir, encoder.config.model_type),
    }
    return Encoders(config, tokenizer, encoder.state_dict(), text, depth - fusion_layers)


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
    """A config of transformers as plain values, without keys that say nothing about the shape."""
    square(getattr(config, "image_size", 0))
    known = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in known.items() if key not in FORGOTTEN}


def _preprocessing(where: str | Path, family: str) -> Config:
    """How pictures become pixels: as preprocessor_config.json says, or as usual in the encoder's family."""
    found = dict(PREPROCESSING[family])
    path = file_of(where, "preprocessor_config.json")
    if path is not None:
        said = json.loads(path.read_text(encoding="utf-8"))
        found |= {key: said[key] for key in ("image_mean", "image_std") if key in said}
        if "do_center_crop" in said:
            found["image_fit"] = "crop" if said["do_center_crop"] else "squash"
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _tokenizer_file(where: str | Path) -> Path:
    file_of(where, BESIDE_VOCABULARY)  # fetched from the hub, so that it lies beside the vocabulary
    for name in FILES:
        if (path := file_of(where, name)) is not None:
            return path
    raise FileNotFoundError(f"{where} has no tokenizer: wanted {' or '.join(FILES)}")


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
