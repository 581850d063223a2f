"""Models by name: the embedded ones, directories, official checkpoints, those of the hub and of open_clip."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from vlprune.models.base import ModelAdapter
from vlprune.models.checkpoints import digest, load_directory, load_official, save_directory
from vlprune.models.fusion import FusionAdapter
from vlprune.models.names import MODELS, ZOO, find_model, of_open_clip

# Raised when outputs, losses or task heads of the adapters change, so that runs are made again.
VERSION = 1


def load_model(name: str) -> ModelAdapter:
    """The pretrained model of a name, in float32, eval mode, on the CPU.

    Args:
        name: of MODELS, "open_clip:" with what `load_open_clip` takes, or what `find_model` finds.

    Raises:
        ValueError: no such model, damaged files, weights that are not finite or of another model.
        OSError: files that are missing.
    """
    if (theirs := of_open_clip(name)) is not None:
        return _open_clip().load_open_clip(theirs)
    path = find_model(name)
    return load_official(path) if path.is_file() else load_directory(path)


def save_model(model: ModelAdapter, path: Path) -> None:
    """Writes a model as a directory that `load_model` and the library of its family load."""
    if isinstance(model, FusionAdapter):
        save_directory(model, path)
    elif model.family == "open_clip":
        _open_clip().save_open_clip(model, path)
    else:
        raise ValueError(f"there is no format for models of family {model.family!r}")


def model_digest(name: str) -> str:
    """Short hash of a model's files."""
    theirs = of_open_clip(name)
    return digest(find_model(name)) if theirs is None else _open_clip().open_clip_digest(theirs)


def _open_clip() -> Any:
    """What reads and writes open_clip's models, imported when one is asked for: it takes seconds."""
    return import_module("vlprune.models.openclip_checkpoints")


__all__ = ["MODELS", "VERSION", "ZOO", "ModelAdapter", "find_model", "load_model", "model_digest", "save_model"]
