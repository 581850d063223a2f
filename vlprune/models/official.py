"""Official checkpoints: the files that the authors of a model published, and what their names say.

The names are those of the reference code of MULTIFLOW (FarinaMatteo/multiflow at 1835f1b), whose BLIP is the original
and whose X-VLM has a CLIP vision encoder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprune.store.tensors import tensors_in, unpickle

SUFFIXES = (".pth", ".pt", ".bin")
# Momentum copies, queues and positions, which the weights do not need.
IGNORED = re.compile(r"_m\.|^(image|text|idx)_queue$|^(queue_)?ptr(_queue)?$|position_ids$")
HEAD_WIDTH = 64  # of every released ViT and BERT of these families


@dataclass(frozen=True)
class OfficialNames:
    """What the official checkpoints of a family call its modules.

    Attributes:
        tower: the first word of the names of the vision encoder, by which a checkpoint of the family is known.
        prefixes: (what an official name begins with, what ours begins with), where # is a number; the first pair that
            fits counts.
        momentum: {first word of a name: that of its momentum copy}, which the reference code masks too.
    """

    tower: str
    prefixes: tuple[tuple[str, str], ...]
    momentum: Mapping[str, str] = field(default_factory=dict)

    def to_ours(self, name: str) -> str:
        """Our name of what an official checkpoint calls `name`."""
        return _rename(name, self.prefixes)

    def to_official(self, name: str) -> str:
        """The official name of what we call `name`."""
        return _rename(name, [(ours, official) for official, ours in self.prefixes])


def _rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        found = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)", name)
        if found:
            for number in found.groups():
                new = new.replace("#", number, 1)
            return new + name[found.end() :]
    return name


def read_official(path: Path, names: OfficialNames) -> dict[str, Tensor]:
    """The weights of an official checkpoint, {our name: tensor}, without momentum copies and queues.

    The file holds the state dict itself, or under "model" or "state_dict"; only tensors and plain values are unpickled.

    Raises:
        ValueError: the file is damaged, or holds other objects than tensors.
    """
    state = _state_dict(path, unpickle(path))
    weights = {name: tensor for name, tensor in state.items() if not IGNORED.search(name)}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} must hold floating-point weights, got {tensor.dtype}")
    return {names.to_ours(name): tensor for name, tensor in weights.items()}


def first_words(path: Path) -> list[str]:
    """The first words of the official names in a checkpoint, in alphabetical order, such as ["itm_head", "temp", …].

    Raises:
        ValueError: the file is damaged, or holds other objects than tensors.
    """
    return sorted({name.split(".")[0] for name in _state_dict(path, unpickle(path))})


def _state_dict(path: Path, state: Any) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    found = tensors_in(path, state, f"{path} holds no state dict of tensors, directly or under 'model' or 'state_dict'")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


# ---- the sizes of a model, from the shapes of its weights ----


def vision_config(
    state: Mapping[str, Tensor], positions: Tensor, patches: Tensor, heads: tuple[int, int] | None
) -> dict[str, Any]:
    """Settings of the vision encoder of a state dict in our names, in transformers' words.

    Args:
        state: {our name: tensor}.
        positions: position embeddings (1 + patches, width).
        patches: weight (width, 3, patch, patch) of the patch embedding.
        heads: attention heads of vision and text; None: as many as are 64 wide.
    """
    width, patch = positions.shape[1], patches.shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": len(state["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": _count(state, "vision_model.encoder.layers"),
        "num_attention_heads": heads[0] if heads else _heads(width, "vision"),
        "image_size": round((len(positions) - 1) ** 0.5) * patch,
        "patch_size": patch,
    }


def text_config(
    state: Mapping[str, Tensor], layers: str, embeddings: str, heads: tuple[int, int] | None
) -> dict[str, Any]:
    """Settings of the text encoder of a state dict in our names, in transformers' words.

    Args:
        state: {our name: tensor}.
        layers: the name of the module whose `layer` holds the layers.
        embeddings: the name of the weight of the word embeddings.
        heads: attention heads of vision and text; None: as many as are 64 wide.
    """
    vocabulary, width = state[embeddings].shape
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{layers}.layer.0.intermediate.dense.bias"]),
        "num_hidden_layers": _count(state, f"{layers}.layer"),
        "num_attention_heads": heads[1] if heads else _heads(width, "text"),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state[embeddings.replace("word", "position")]),
    }


def _count(state: Collection[str], layers: str) -> int:
    return 1 + max(
        int(name.removeprefix(f"{layers}.").split(".")[0]) for name in state if name.startswith(f"{layers}.")
    )


def _heads(width: int, tower: str) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"the number of {tower} attention heads is not in a state dict, and width {width} is no multiple of "
            f"{HEAD_WIDTH}: put a config.json beside the checkpoint, or give `heads`"
        )
    return width // HEAD_WIDTH
