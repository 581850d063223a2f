"""Models by name: the embedded ones and directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlprune.config import unknown
from vlprune.models.base import ModelAdapter
from vlprune.models.checkpoints import digest, load_directory

# Raised when outputs, losses or task heads of the adapters change, so that runs are made again.
VERSION = 1
ZOO = Path(__file__).parent / "zoo"

MODELS: Mapping[str, Path] = {"tiny-blip": ZOO / "tiny-blip", "tiny-xvlm": ZOO / "tiny-xvlm"}


def find_model(name: str) -> Path:
    """The directory of an embedded model or of a path.

    Raises:
        ValueError: neither.
    """
    path = MODELS.get(name, Path(name))
    if not path.is_dir():
        raise ValueError(f"{unknown('model', name, MODELS)}, or a directory")
    return path


def load_model(name: str) -> ModelAdapter:
    """The pretrained model of a name in MODELS or of a directory, in float32, eval mode, on the CPU."""
    return load_directory(find_model(name))


def model_digest(name: str) -> str:
    """Short hash of a model's files."""
    return digest(find_model(name))


__all__ = ["MODELS", "VERSION", "ModelAdapter", "find_model", "load_model", "model_digest"]
