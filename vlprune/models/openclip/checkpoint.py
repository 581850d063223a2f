"""Models of open_clip by name, from checkpoint files and directories, and back to a directory of open_clip's."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from vlprune import escapes
from vlprune.config import unknown
from vlprune.models.base import Config, ModelAdapter
from vlprune.models.card import CardLines
from vlprune.models.directory import check_sizes
from vlprune.models.family import Family
from vlprune.models.fingerprint import Fingerprint, fingerprint
from vlprune.models.openclip.adapter import OpenCLIP, OpenCLIPInput
from vlprune.models.openclip.attention import packed_state
from vlprune.models.openclip.coca import OpenCoCa
from vlprune.models.openclip.internals import PreprocessCfg, merge_preprocess_dict
from vlprune.store.atomic import atomic, write_text
from vlprune.store.documents import read_json
from vlprune.store.tensors import read_tensors, tensors_in, unpickle

PREFIX, CONFIG = "open_clip:", "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# The names that the weights in a directory of open_clip may have.
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


def load(adapter: type[OpenCLIP], name: str) -> OpenCLIP:  # noqa: ARG001 - the settings say which class
    """The model of a name, in float32 and evaluation mode, on the CPU.

    Args:
        adapter: the family's class.
        name: a directory with open_clip_config.json, with or without "open_clip:" before it; or "open_clip:" and an
            architecture, alone for random weights, always the same, or followed by ":" and a pretrained tag or a
            checkpoint file.

    Raises:
        FileNotFoundError: weights are not there, or cannot be fetched.
        ValueError: the architecture or tag is unknown or not supported, a file is damaged, weights are those of another
            model or not finite.
    """
    source = _find(name)
    if refused := _refusal(source.model_cfg, source.preprocess_cfg):
        raise ValueError(f"{name}: {refused} cannot be pruned; ViT or ResNet with open_clip's own text tower can")
    if source.weights is None:
        logger.warning("%s names no weights: they are random; add a pretrained tag or a checkpoint file", name)
        towers = build_towers(source.model_cfg)
    else:
        _check_fits(source.model_cfg, source.weights)
        towers = build_towers(source.model_cfg)
        _fill(towers, source.weights)
    return adapt(towers, source.model_cfg, source.preprocess_cfg).eval()


def save(model: OpenCLIP, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a directory that `open_clip.create_model("local-dir:...")` and `load` read.

    Query, key and value are one tensor again; the weights file alone loads as `pretrained` of the architecture too.
    """
    path.mkdir(parents=True, exist_ok=True)
    state = packed_state(model)
    if not model.config["model_cfg"].get("custom_text"):
        # A plain CLIP has no module for its text tower.
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    # Counters of batches are whole numbers and stay so.
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    with atomic(path / WEIGHTS) as part:
        save_file(weights, part, metadata={"format": "pt"})
    config = {key: model.config[key] for key in ("model_cfg", "preprocess_cfg")}
    write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")


def files_fingerprint(name: str) -> Fingerprint:
    """What the outputs of a model of open_clip depend on: its settings and its weights."""
    source = _find(name)
    settings = json.dumps([source.model_cfg, source.preprocess_cfg], sort_keys=True)
    if source.weights is None:
        return fingerprint({}, settings, f"random {torch.__version__} {open_clip.__version__}")
    return fingerprint({"weights": source.weights}, settings)


def class_of(adapter: type[OpenCLIP], name: str) -> type[ModelAdapter]:  # noqa: ARG001 - the settings say which class
    """The class of the model of a name."""
    return _class(_find(name).model_cfg)


def _class(model_cfg: Config) -> type[OpenCLIP]:
    return OpenCoCa if "multimodal_cfg" in model_cfg else OpenCLIP


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
    stored = read_json(path / CONFIG)
    if not isinstance(stored, dict):
        raise ValueError(f"{path / CONFIG} must hold an object with 'model_cfg', got {type(stored).__name__}")
    model_cfg = stored.get("model_cfg")
    parts = [model_cfg.get(part) for part in ("vision_cfg", "text_cfg")] if isinstance(model_cfg, dict) else []
    if not isinstance(model_cfg, dict) or not all(
        isinstance(part, dict) for part in (*parts, stored.get("preprocess_cfg", {}))
    ):
        raise ValueError(f"{path / CONFIG} has no 'model_cfg' with 'vision_cfg' and 'text_cfg', or no settings in them")
    there = [path / name for name in FILES if (path / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{path} has no weights: wanted one of {', '.join(FILES)}")
    preprocess = merge_preprocess_dict(PreprocessCfg(), stored.get("preprocess_cfg", {}))
    return _Source(model_cfg, preprocess, there[0])


def _refusal(model_cfg: Config, preprocess: Config) -> str | None:
    """The part or property of a model that is not supported; None where all of it is."""
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


def build_towers(model_cfg: Config) -> Any:
    """open_clip's modules with random weights, always the same, of settings in open_clip's words."""
    model_cfg = copy.deepcopy(model_cfg)
    model_cfg.pop("custom_text", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if "multimodal_cfg" not in model_cfg:
            return open_clip.CustomTextCLIP(**model_cfg)
        towers = open_clip.CoCa(**model_cfg)
        # open_clip leaves it uninitialised.
        projection = towers.text_decoder.text_projection
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
        return towers


def _check_fits(model_cfg: Config, path: Path) -> None:
    """Refuses a checkpoint of a much smaller model than the settings want, before modules are made of them."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a checkpoint file ends in {', '.join(SUFFIXES)}, got {path.name}")
    stored = read_tensors(path) if path.suffix == ".safetensors" else unpickle(path)
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    state = tensors_in(path, stored, f"{path} holds no state dict of tensors, directly or under 'state_dict'")
    check_sizes(model_cfg, len(state), path)
    try:
        with torch.device("meta"):
            towers = build_towers(model_cfg)
    except Exception as error:  # open_clip raises nearly anything on settings that make no sense
        raise ValueError(f"the settings of {path} make no model: {escapes.reason(error)}") from None
    wanted, there = (sum(t.numel() for t in tensors.values()) for tensors in (towers.state_dict(), state))
    if wanted > 2 * there:  # some are stored in other shapes, such as positions of another size of images
        raise ValueError(f"{path} is of another model: it holds {there:,} numbers, {wanted:,} are wanted")


def _fill(towers: Any, path: Path) -> None:
    """Writes a checkpoint into open_clip's modules, in place, with open_clip's conversions of older ones."""
    try:
        found: Any = open_clip.load_checkpoint(towers, str(path), strict=False, weights_only=True)
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


def adapt(towers: Any, model_cfg: Config, preprocess: Config) -> OpenCLIP:
    """The model of open_clip's modules, which it takes over.

    Args:
        towers: modules as `build_towers` returns them.
        model_cfg: their settings in open_clip's words.
        preprocess: how pictures become pixels, in open_clip's words.
    """
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
    model = _class(model_cfg)(towers, tokenizer, image)
    model.config = {
        "family": model.family,
        "model_cfg": copy.deepcopy(model_cfg),
        "preprocess_cfg": {**preprocess, "size": size},
    }
    return model


# ---- the card ----

LOADING = """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIRECTORY")
tokenizer = open_clip.get_tokenizer("local-dir:DIRECTORY")"""
NOTE = "Query, key and value weights are packed as open_clip holds them."


def card_lines(_model: OpenCLIP) -> CardLines:
    """What open_clip's models say on their cards."""
    return CardLines("open_clip", LOADING, NOTE, target="of open_clip that vlprune has loaded")


FAMILY = Family(
    adapter=OpenCLIP, load=load, save=save, fingerprint=files_fingerprint, card=card_lines, class_of=class_of
)
