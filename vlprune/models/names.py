"""What the name of a model stands for: an embedded one, a path, an id on the hub, a model of open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vlprune.config import unknown
from vlprune.models.official import SUFFIXES

ZOO = Path(__file__).parent / "zoo"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OPEN_CLIP, OPEN_CLIP_CONFIG = "open_clip:", "open_clip_config.json"
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


def of_open_clip(name: str) -> str | None:
    """What open_clip's functions call a model, if it is one of theirs; None for another."""
    if name.startswith(OPEN_CLIP):
        return name
    path = name if name in MODELS or not HUB_ID.fullmatch(name) or Path(name).exists() else str(find_model(name))
    return path if (Path(path) / OPEN_CLIP_CONFIG).is_file() else None
