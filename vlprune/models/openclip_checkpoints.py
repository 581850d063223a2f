"""Models of open_clip by name, from checkpoint files and directories, and back to a directory of open_clip's."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError
from safetensors.torch import save_file

from vlprune.config import unknown
from vlprune.models.base import Config
from vlprune.models.coca import OpenCoCa
from vlprune.models.names import OPEN_CLIP as PREFIX
from vlprune.models.names import OPEN_CLIP_CONFIG as CONFIG
from vlprune.models.official import refused
from vlprune.models.openclip import OpenCLIP, OpenCLIPInput
from vlprune.models.openclip_attention import packed_state
from vlprune.store.atomic import atomic, write_text

WEIGHTS = "open_clip_model.safetensors"
# What a directory of open_clip may call its weights.
FILES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
FITS = {"shortest": "crop", "squash": "squash"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """What a name stands for: settings in open_clip's words, and a file of weights or None for random ones."""

    model_cfg: Config
    preprocess_cfg: Config
    weights: Path | None


def load_open_clip(name: str) -> OpenCLIP:
    """The adapter of a model of open_clip, in float32 and eval mode, on the CPU.

    Args:
        name: a directory with open_clip_config.json, with or without "open_clip:" before it; or "open_clip:" and an
            architecture, alone for random weights, always the same, or followed by ":" and a pretrained tag or a
            checkpoint file.

    Raises:
        FileNotFoundError: weights that are not there, or cannot be fetched.
        ValueError: an unknown architecture or tag, an architecture that is not supported, a damaged file, weights of
            another model, weights that are not finite.
    """
    source = _find(name)
    model_cfg = copy.deepcopy(source.model_cfg)
    if refused := _refusal(model_cfg, source.preprocess_cfg):
        raise ValueError(f"{name}: {refused} cannot be pruned; ViT or ResNet with open_clip's own text tower can")
    towers = _towers(model_cfg)
    if source.weights is None:
        logger.warning("%s names no weights: they are random; add a pretrained tag or a checkpoint file", name)
    else:
        _fill(towers, source.weights)
    return _adapter(towers, source.model_cfg, source.preprocess_cfg).eval()


def build_open_clip(config: Config) -> OpenCLIP:
    """An adapter with random weights, from the settings {"model_cfg", "preprocess_cfg"} of another one's `config`."""
    model_cfg = copy.deepcopy(config["model_cfg"])
    return _adapter(_towers(model_cfg), config["model_cfg"], config["preprocess_cfg"])


def save_open_clip(model: OpenCLIP, path: Path) -> None:
    """Writes a directory that `open_clip.create_model("local-dir:...")` and `load_open_clip` read.

    Query, key and value are one tensor again; the weights file alone loads as `pretrained` of the architecture too.
    """
    path.mkdir(parents=True, exist_ok=True)
    state = packed_state(model)
    if not model.config["model_cfg"].get("custom_text"):
        # A plain CLIP has no module for its text tower.
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    with atomic(path / WEIGHTS) as part:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, part, metadata={"format": "pt"})
    config = {key: model.config[key] for key in ("model_cfg", "preprocess_cfg")}
    write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")


def open_clip_digest(name: str) -> str:
    """Short hash of what the outputs of a model of open_clip depend on: its settings and its weights."""
    source = _find(name)
    sha = hashlib.sha256(json.dumps([source.model_cfg, source.preprocess_cfg], sort_keys=True).encode())
    if source.weights is None:
        sha.update(f"random {torch.__version__} {open_clip.__version__}".encode())
    else:
        with source.weights.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]


# ---- what a name stands for ----


def _find(name: str) -> _Source:
    given = name.removeprefix(PREFIX)
    architecture, _, weights = given.partition(":")
    architecture = architecture.replace("/", "-")
    model_cfg = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else None
    if given == name or (model_cfg is None and Path(given).is_dir()):
        return _in_directory(Path(given))
    if model_cfg is None:
        raise ValueError(f"{unknown('model of open_clip', architecture, open_clip.list_models())}, or a directory")
    preprocess = asdict(PreprocessCfg())
    if not weights:
        return _Source(model_cfg, preprocess, None)
    if Path(weights).is_file():
        return _Source(model_cfg, preprocess, Path(weights))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if Path(weights).suffix in SUFFIXES or "/" in weights:
        raise FileNotFoundError(f"there is no checkpoint file {weights}")
    tag = open_clip.get_pretrained_cfg(architecture, weights)
    if not tag:
        raise ValueError(f"{unknown(f'pretrained tag of {architecture}', weights, tags)}, or a checkpoint file")
    # open_clip only warns that such weights were trained with another activation.
    if tag.get("quick_gelu"):
        model_cfg["quick_gelu"] = True
    try:
        path = Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"cannot fetch {architecture}'s weights {weights!r}; give a file: {PREFIX}{architecture}:FILE ({reason})"
        ) from None
    return _Source(model_cfg, merge_preprocess_dict(preprocess, tag), path)


def _in_directory(path: Path) -> _Source:
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"a directory of open_clip holds {CONFIG} and weights; {path} has no {CONFIG}")
    try:
        stored = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is no JSON: {error}") from None
    model_cfg = stored.get("model_cfg") if isinstance(stored, dict) else None
    if not isinstance(model_cfg, dict) or not {"vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise ValueError(f"{path / CONFIG} has no 'model_cfg' with 'vision_cfg' and 'text_cfg'")
    there = [path / name for name in FILES if (path / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{path} has no weights: wanted one of {', '.join(FILES)}")
    preprocess = merge_preprocess_dict(PreprocessCfg(), stored.get("preprocess_cfg", {}))
    return _Source(model_cfg, preprocess, there[0])


def _refusal(model_cfg: Config, preprocess: Config) -> str | None:
    """What of a model is not supported, or None."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    is_coca = "multimodal_cfg" in model_cfg
    size = vision.get("image_size", 224)
    custom = [cfg for cfg in (vision, text) if cfg.get("block_type") == "custom" or any(map(cfg.get, CUSTOM_BLOCKS))]
    reasons = {
        "a vision tower of timm": vision.get("timm_model_name"),
        "a text tower of transformers": text.get("hf_model_name"),
        "a tokenizer of the hub": text.get("hf_tokenizer_name"),
        "a model trained with SigLIP's loss": model_cfg.get("init_logit_bias") is not None,
        "attention with norms or scales of its own": custom,
        "a text tower that is not causal": text.get("no_causal_mask"),
        "a text tower that does not pool the end token": text.get("pool_type", "argmax") != "argmax",
        "a CoCa without class token in its text": is_coca and not text.get("embed_cls"),
        "a CLIP with a class token in its text": not is_coca and text.get("embed_cls"),
        "a vocabulary smaller than CLIP's": text.get("vocab_size", 49408) < 49408,
        "a model of images that are not square": isinstance(size, (list, tuple)) and size[0] != size[1],
        f"preparing images by {preprocess['resize_mode']!r}": preprocess["resize_mode"] not in FITS,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


# ---- modules and weights ----


def _towers(model_cfg: Config) -> Any:
    """open_clip's modules with random weights, always the same; model_cfg is used up."""
    model_cfg.pop("custom_text", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if "multimodal_cfg" not in model_cfg:
            return open_clip.CustomTextCLIP(**model_cfg)
        towers = open_clip.CoCa(**model_cfg)
        # open_clip leaves it as the memory was.
        projection = towers.text_decoder.text_projection
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
        return towers


def _fill(towers: Any, path: Path) -> None:
    """Writes a checkpoint into open_clip's modules, in place, with open_clip's conversions of older ones."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a checkpoint file ends in {', '.join(SUFFIXES)}, got {path.name}")
    try:
        found: Any = open_clip.load_checkpoint(towers, str(path), strict=False, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values{refused(error)}") from None
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{path} is damaged or more than weights: {' '.join(str(error).split())[:200]}") from None
    except (RuntimeError, AttributeError, KeyError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or of another model: {reason}") from None
    if differing := sorted([*found.missing_keys, *found.unexpected_keys]):
        raise ValueError(
            f"{path} is of another model: {len(found.missing_keys)} names are missing and "
            f"{len(found.unexpected_keys)} unknown, e.g. {differing[0]}"
        )
    for name, tensor in towers.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite weights")


def _adapter(towers: Any, model_cfg: Config, preprocess: Config) -> OpenCLIP:
    text = model_cfg["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=towers.text.context_length, **text.get("tokenizer_kwargs", {}))
    size = towers.visual.image_size
    size = size if isinstance(size, int) else size[0]
    image = OpenCLIPInput(
        size,
        tuple(preprocess["mean"]),
        tuple(preprocess["std"]),
        FITS[preprocess["resize_mode"]],
        "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
    )
    model = (OpenCoCa if "multimodal_cfg" in model_cfg else OpenCLIP)(towers, tokenizer, image)
    model.config = {
        "family": model.family,
        "model_cfg": copy.deepcopy(model_cfg),
        "preprocess_cfg": {**preprocess, "size": size},
    }
    return model
