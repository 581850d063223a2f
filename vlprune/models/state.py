"""State dicts: read from the files of a directory, checked against a model and written into it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = f"{SAFETENSORS}.index.json"
# A checkpoint of another library may lack what only pretraining needs.
OPTIONAL = frozenset({"temp"})


def read_state(directory: Path) -> dict[str, Tensor]:
    """{name: float32 tensor} of the weights in a directory: one safetensors file, several with an index, or a pickle.

    Raises:
        FileNotFoundError: none of them.
        ValueError: a damaged file.
    """
    files = [directory / SAFETENSORS]
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text())["weight_map"]
        files = [directory / name for name in sorted(set(index.values()))]
    elif not files[0].is_file():
        files = [directory / PICKLE]
    state: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no weights: wanted {SAFETENSORS}, {INDEX} or {PICKLE}")
        state |= {name: tensor.float() for name, tensor in _read(path).items()}
    return state


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def names_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Each parameter with all its names, the first one first: tied ones have several."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield from names.values()


def fill(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Writes a state into the model, in place; tied tensors may be there under one of their names or under several.

    Raises:
        ValueError: names or shapes of another model, tied tensors that differ, weights that are not finite.
    """
    groups = list(names_of(model))
    known = {name for _, names in groups for name in names}
    absent = [names[0] for _, names in groups if not any(name in state for name in names) and names[0] not in OPTIONAL]
    strange = [name for name in state if name not in known]
    if differing := sorted([*absent, *strange]):
        raise ValueError(
            f"{where} is of another model: {len(absent)} names are missing and {len(strange)} unknown, "
            f"e.g. {differing[0]}"
        )
    for parameter, names in groups:
        given = [name for name in names if name in state]
        for name in given:
            tensor = state[name]
            if tensor.shape != parameter.shape:
                raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {tuple(parameter.shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{where}: {name} holds NaN or infinite weights")
            if not torch.equal(tensor, state[given[0]]):
                raise ValueError(f"{where}: {name} and {given[0]} are one tensor of the model, but differ")
    with torch.no_grad():
        for parameter, names in groups:
            for name in names[:]:
                if name in state:
                    parameter.copy_(state[name])
                    break
