"""Models by name: the embedded ones, directories, official checkpoints, those of the hub and of open_clip."""

from vlprune.models.base import ModelAdapter
from vlprune.models.registry import (
    FAMILIES,
    MODELS,
    ZOO,
    build_model,
    family_of,
    find_model,
    load_model,
    model_card,
    model_fingerprint,
    save_model,
    take_model_fingerprint,
)

# Raised when a change of the code that the families share changes outputs, losses or what is read of a file, so that
# runs are made again; a family's own class counts by its source.
VERSION = 1

__all__ = [
    "FAMILIES",
    "MODELS",
    "VERSION",
    "ZOO",
    "ModelAdapter",
    "build_model",
    "family_of",
    "find_model",
    "load_model",
    "model_card",
    "model_fingerprint",
    "save_model",
    "take_model_fingerprint",
]
