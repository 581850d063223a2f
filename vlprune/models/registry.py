"""The registry of models: what the name of one stands for, and the families that there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerFast

from vlprune.config import build, unknown
from vlprune.masks import Masks
from vlprune.models.base import Config, ModelAdapter
from vlprune.models.card import card
from vlprune.models.directory import CONFIG, family_in, read_config
from vlprune.models.family import Family
from vlprune.models.fingerprint import Fingerprint
from vlprune.models.fusion import FusionAdapter
from vlprune.models.official import SUFFIXES, first_words

# {name of a family: the module whose FAMILY describes it}, imported when the first model of the family is asked for.
FAMILIES: dict[str, str] = {
    "blip": "vlprune.models.blip.checkpoint",
    "xvlm": "vlprune.models.xvlm.checkpoint",
    "open_clip": "vlprune.models.openclip.checkpoint",
}
ZOO = Path(__file__).parent / "zoo"
MODELS: Mapping[str, Path] = {"tiny-blip": ZOO / "tiny-blip", "tiny-xvlm": ZOO / "tiny-xvlm"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt")


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(unknown("model family", name, FAMILIES))
    return import_module(FAMILIES[name]).FAMILY


# ---- what a name stands for ----


def find_model(name: str) -> Path:
    """The directory or file of an embedded model, of a path or, downloaded, of an id on the Hugging Face hub.

    Raises:
        ValueError: the name is none of them.
        OSError: a model of the hub is not there or cannot be downloaded.
    """
    path = MODELS.get(name, Path(name))
    if path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
        return path
    if HUB_ID.fullmatch(name) and not path.exists():
        try:
            return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"there is no directory {name!r}, and the hub does not give it: {reason}") from None
    raise ValueError(
        f"{unknown('model', name, MODELS)}, or a directory, an official checkpoint ({', '.join(SUFFIXES)}) or a hub id"
    )


def _prefix(name: str) -> str | None:
    """The family of a name "<family>:…"; None of another name."""
    family, colon, _ = name.partition(":")
    return family if colon and family in FAMILIES else None


def _resolve(name: str) -> tuple[Family, str]:
    """The family of a name, and the source that it reads: a path, or the name itself if it begins with the family."""
    prefix = _prefix(name)
    if prefix is not None:
        return get_family(prefix), name
    path = find_model(name)
    return _family_at(path), str(path)


def _family_at(path: Path) -> Family:
    """The family of a directory or file.

    A directory's is named in its config.json, or by its <family>_config.json; that of an official checkpoint shows in
    the names of its weights.
    """
    if path.is_file():
        return _family_of_official(path)
    for name in FAMILIES:
        if (path / f"{name}_config.json").is_file():
            return get_family(name)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"a model directory holds {CONFIG}, weights and tokenizer.json; {path} has no {CONFIG}")
    named = family_in(read_config(path / CONFIG))
    if named not in FAMILIES:
        raise ValueError(
            f"{path / CONFIG}: wanted the settings of a model whose family or model_type is known, "
            f"got {unknown('family', str(named), FAMILIES)}"
        )
    return get_family(named)


def _family_of_official(path: Path) -> Family:
    words, towers = first_words(path), {}
    for name in FAMILIES:
        found = get_family(name)
        if found.official is None:
            continue
        if found.official.tower in words:
            return found
        towers[name] = found.official.tower
    known = ", ".join(f"{name} ({tower}.…)" for name, tower in towers.items())
    raise ValueError(f"{path} is an official checkpoint of none of {known}; its names begin with: {', '.join(words)}")


# ---- models ----


def family_of(name: str) -> type[ModelAdapter]:
    """The class of the model of a name, without building the model; its `options` are the family's.

    Raises:
        ValueError: the name stands for no model, or files are damaged.
        OSError: files are missing.
    """
    family, source = _resolve(name)
    return family.class_of(family.adapter, source)


def load_model(name: str, options: Mapping[str, Any] | None = None) -> ModelAdapter:
    """The pretrained model of a name, in float32 and evaluation mode, on the CPU.

    Args:
        name: an embedded model (a key of MODELS), a directory, an official checkpoint file, a hub id, or "open_clip:"
            with an architecture and a pretrained tag or file, such as "open_clip:ViT-B-32:openai".
        options: options of the model's family, such as {"prompt": "a photo of "}; what is not given stays as the
            checkpoint says.

    Raises:
        ConfigError: an option is unknown or out of range.
        ValueError: the name stands for no model, files are damaged, weights are those of another model or not finite.
        OSError: files are missing.
    """
    family, source = _resolve(name)
    chosen = build(family.class_of(family.adapter, source).options, options or {}, "model.options")
    model = family.load(family.adapter, source)
    model.apply_options(chosen)
    return model


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> FusionAdapter:
    """A BLIP or X-VLM with fresh weights.

    Args:
        config: {"family": "blip" or "xvlm", "vision": {...}, "text": {...}} in transformers' words, and further
            arguments of the family's class, such as "embed_dim".
        tokenizer: a WordPiece tokenizer with [CLS], [SEP] and [MASK], for BLIP with [DEC] and [ENC] too.

    Raises:
        ValueError: the family is unknown, or its models are not built of a config and a tokenizer.
    """
    adapter = get_family(str(config.get("family"))).adapter
    if not issubclass(adapter, FusionAdapter):
        raise ValueError(f"models of {adapter.family} are not built of a config and a tokenizer")
    return adapter.from_config(config, tokenizer)


def save_model(model: ModelAdapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a model as a directory that `load_model` and the library of its family load.

    Args:
        model: the model.
        path: the directory, which is made where there is none.
        dtype: number format of the weights.
    """
    get_family(model.family).save(model, path, dtype)


def model_card(model: ModelAdapter, masks: Masks, provenance: Mapping[str, str]) -> str:
    """The README.md, in Markdown, of a pruned model's directory.

    Args:
        model: the model that was pruned.
        masks: the masks that were applied.
        provenance: where they come from, {name: value} in the order of the lines; "model" is the name and the
            fingerprint of the model.
    """
    return card(get_family(model.family).card(model), model.graph, masks, provenance)


def model_fingerprint(name: str) -> str:
    """Short hash of the contents of all files that the model of a name depends on, wherever they lie.

    Weights, settings and tokenizer count, those beside a checkpoint file too.

    Raises:
        ValueError: the name stands for no model, or files are damaged.
        OSError: files are missing.
    """
    return take_model_fingerprint(name).contents


def take_model_fingerprint(name: str) -> Fingerprint:
    """What is known of the files of the model of a name; errors as of `model_fingerprint`."""
    family, source = _resolve(name)
    return family.fingerprint(source)
