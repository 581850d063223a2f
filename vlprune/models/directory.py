"""Directories and files of FusionAdapters: written so that transformers loads them, read from wherever they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipImageProcessor, CLIPImageProcessor, PreTrainedTokenizerFast

from vlprune import escapes
from vlprune.models.base import Config
from vlprune.models.fingerprint import Fingerprint, fingerprint
from vlprune.models.fusion import FusionAdapter
from vlprune.models.images import ImageInput
from vlprune.models.official import IGNORED
from vlprune.models.state import SAFETENSORS, check_fits, fill, names_of, read_state, weight_files
from vlprune.models.tokenizer import BERT, FILES, tokenizer_files, tokenizer_in
from vlprune.store.atomic import atomic
from vlprune.store.documents import read_json

CONFIG = "config.json"
OURS = "vlprune"  # the key of a transformers config that holds what transformers does not know of
# Keys of a config.json that transformers writes beside ours.
TRANSFORMERS = ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "tie_word_embeddings")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
LARGEST = 10**6  # of the whole numbers in the settings of a model: widths, sizes of vocabularies
ROLES = {"pad": "[PAD]", "sep": "[SEP]", "eos": "[SEP]"}  # ids of a text config, by the pieces that they are of

Adapter = TypeVar("Adapter", bound=FusionAdapter)
# (settings of config.json, state dict) -> settings that `FusionAdapter.from_config` takes.
ConfigOf = Callable[[Config, Mapping[str, Tensor]], Config]


# ---- reading ----


def read_config(path: Path) -> Config:
    """The settings in a config.json.

    Raises:
        ValueError: the file is damaged, or holds something else than a model's settings.
    """
    stored = read_json(path)
    if not isinstance(stored, dict) or ("family" in stored and not {"vision", "text"} <= stored.keys()):
        raise ValueError(f"{path} must hold the settings of a model, with 'vision' and 'text' beside a 'family'")
    return stored


def family_in(stored: Config) -> str | None:
    """The family that the settings of a config.json name: ours beside transformers', or transformers' model type."""
    ours = stored.get(OURS)
    beside = ours.get("family") if isinstance(ours, dict) else None
    return stored.get("family") or beside or stored.get("model_type")


def own_settings(stored: Config) -> Config:
    """The settings of a config.json that names a family, without those that only transformers reads."""
    return {key: value for key, value in stored.items() if key not in TRANSFORMERS}


def read_directory(path: Path, config_of: ConfigOf) -> tuple[Config, dict[str, Tensor], PreTrainedTokenizerFast]:
    """Settings, weights and tokenizer of a model directory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    stored, state = read_config(path / CONFIG), read_state(path)
    config, tokenizer = config_of(stored, state), tokenizer_in(path)
    if tokenizer is None:
        raise FileNotFoundError(f"a model directory holds {' or '.join(FILES)}; {path} has neither")
    return config, {name: tensor for name, tensor in state.items() if not IGNORED.search(name)}, tokenizer


def config_beside(path: Path, family: str) -> Config | None:
    """The settings in a config.json beside an official checkpoint; None where there are none of that family."""
    beside = path.parent / CONFIG
    stored = read_config(beside) if beside.is_file() else {}
    return own_settings(stored) if stored.get("family") == family else None


@contextmanager
def sizes_told(path: Path) -> Iterator[None]:
    """A context that reads the sizes of a model off its weights, whose errors say which file does not tell them."""
    try:
        yield
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is of another model, its sizes cannot be told: {error}") from None


def check_vocabulary(path: Path, config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a tokenizer of another vocabulary than an official checkpoint's.

    Raises:
        ValueError: their sizes differ.
    """
    size = config["text"]["vocab_size"]
    if len(tokenizer) != size:
        raise ValueError(
            f"{path} has a vocabulary of {size}, the tokenizer of {len(tokenizer)}; put its tokenizer.json beside it"
        )


def filled(
    adapter: type[Adapter],
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    state: Mapping[str, Tensor],
    where: Path,
    bos: str,
) -> Adapter:
    """A model in evaluation mode with the weights of a state dict.

    Args:
        adapter: class of the model.
        config: what `FusionAdapter.from_config` takes.
        tokenizer: its tokenizer, which gives the ids of special tokens that the config does not.
        state: {our name: tensor}.
        where: the file or directory that the state came from, which an error names.
        bos: the piece that begins what the decoder reads.
    """
    text = dict(config["text"])
    for key, token in {**ROLES, "bos": bos}.items():
        text.setdefault(f"{key}_token_id", tokenizer.convert_tokens_to_ids(token))
    whole = {**config, "family": adapter.family, "text": text}
    check_sizes(whole, len(state), where)
    try:
        with torch.device("meta"):  # a model without content, in no time and memory
            bare = adapter.from_config(whole, tokenizer)
    except Exception as error:  # transformers raises nearly anything on settings that make no sense
        raise ValueError(f"the settings of {where} make no model: {escapes.reason(error)}") from None
    check_fits(bare, state, where)
    model = adapter.from_config(whole, tokenizer)
    fill(model, state, where)
    return model.eval()


def check_sizes(settings: Any, tensors: int, where: object) -> None:
    """Refuses settings that no model has, before modules are made of them.

    Args:
        settings: nested plain values of a config.
        tensors: number of tensors in the weights, of which every layer has some.
        where: the file or directory, which an error names.

    Raises:
        ValueError: a whole number beyond LARGEST, or more layers than tensors.
    """
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if "layers" in str(key) and isinstance(value, int) and value > tensors:
                raise ValueError(f"the settings of {where} want {key} = {value}, its weights are {tensors} tensors")
            check_sizes(value, tensors, where)
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_sizes(value, tensors, where)
    elif isinstance(settings, int) and abs(settings) > LARGEST:
        raise ValueError(f"the settings of {where} hold the number {settings}, at most {LARGEST:,} make sense")


# ---- writing ----


def write_directory(model: FusionAdapter, path: Path, config: Config, dtype: torch.dtype) -> None:
    """Writes config.json and the weights of a model; tied tensors are there under every name, as transformers wants.

    Args:
        model: the model.
        path: the directory, which is made where there is none.
        config: the settings in transformers' words.
        dtype: number format of the weights.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    state = {}
    for parameter, names in names_of(model):
        for name in names:
            state[name] = parameter.detach().to(dtype, copy=name != names[0]).contiguous()
    with atomic(path / SAFETENSORS) as part:
        save_file(state, part, metadata={"format": "pt"})


def image_processor(image: ImageInput) -> Any:
    """The image processor of transformers that prepares pictures as `image` does."""
    settings = asdict(image)
    size, fit = settings.pop("size"), settings.pop("fit")
    normalise = {"image_mean": list(settings["mean"]), "image_std": list(settings["std"]), "resample": 3}
    if fit == "squash":
        return BlipImageProcessor(size={"height": size, "width": size}, **normalise)
    crop = {"height": size, "width": size}
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop, **normalise)


# ---- fingerprints ----


def files_fingerprint(source: str) -> Fingerprint:
    """Of all files that a model of this format depends on, those beside a checkpoint file too."""
    path = Path(source)
    directory = path if path.is_dir() else path.parent
    if path.is_dir():
        files = {f"weights {number}": file for number, file in enumerate(weight_files(path))}
    else:
        files = {"weights": path, "vocabulary": BERT}
    beside = [*(directory / name for name in (CONFIG, *PROCESSORS)), *tokenizer_files(directory)]
    return fingerprint(files | {file.name: file for file in beside if file.is_file()})
