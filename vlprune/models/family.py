"""Family: how the models of one family are recognised, read, written, fingerprinted and described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlprune.models.base import ModelAdapter
from vlprune.models.card import CardLines
from vlprune.models.fingerprint import Fingerprint
from vlprune.models.official import OfficialNames


def one_class(adapter: type[ModelAdapter], source: str) -> type[ModelAdapter]:  # noqa: ARG001
    """The `class_of` of a family whose models are all of one class."""
    return adapter


@dataclass(frozen=True)
class Family:
    """A family of models, as the registry knows it.

    A source is the path of a directory or a checkpoint file, or a name that begins with the family's and a colon, which
    the family alone understands, such as "open_clip:ViT-B-32:openai".

    Attributes:
        adapter: class of the models.
        load: (adapter, source) -> the model, in float32, in evaluation mode, on the CPU.
        save: (model, directory, number format of the weights) -> None; writes files that `load` and the library of the
            family read.
        fingerprint: source -> what is known of the present contents of all files that the model depends on.
        card: model -> what the family says on the model's card.
        official: what the official checkpoints of the family call its modules; None: there are none.
        class_of: (adapter, source) -> the class of the model, found without building it.
    """

    adapter: type[ModelAdapter]
    load: Callable[[type[Any], str], ModelAdapter]
    save: Callable[[Any, Path, torch.dtype], None]
    fingerprint: Callable[[str], Fingerprint]
    card: Callable[[Any], CardLines]
    official: OfficialNames | None = None
    class_of: Callable[[type[Any], str], type[ModelAdapter]] = one_class
