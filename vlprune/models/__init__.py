"""Models by name: the embedded ones, directories, official checkpoints, those of the hub and of open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vlprune.config import unknown
from vlprune.models.base import ModelAdapter
from vlprune.models.checkpoints import digest, load_directory, load_official, save_directory
from vlprune.models.official import SUFFIXES

# Raised when outputs, losses or task heads of the adapters change, so that runs are made again.
VERSION = 1
ZOO = Path(__file__).parent / "zoo"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt")

MODELS: Mapping[str, Path] = {"tiny-blip": ZOO / "tiny-blip", "tiny-xvlm": ZOO / "tiny-xvlm"}


def find_model(name: str) -> Path:
    """The directory or file of an embedded model, of a path or, downloaded, of an id on the Hugging Face hub.

    Raises:
        ValueError: none of them.
        OSError: a model of the hub that is not there or cannot be downloaded.
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


def load_model(name: str) -> ModelAdapter:
    """The pretrained model of a name, in float32, eval mode, on the CPU.

    Args:
        name: of MODELS, or what `find_model` finds.

    Raises:
        ValueError: no such model, damaged files, weights that are not finite or of another model.
    """
    path = find_model(name)
    return load_official(path) if path.is_file() else load_directory(path)


def save_model(model: ModelAdapter, path: Path) -> None:
    """Writes a model as a directory that `load_model` and the library of its family load."""
    save_directory(model, path)


def model_digest(name: str) -> str:
    """Short hash of a model's files."""
    return digest(find_model(name))


__all__ = ["MODELS", "VERSION", "ModelAdapter", "find_model", "load_model", "model_digest", "save_model"]
