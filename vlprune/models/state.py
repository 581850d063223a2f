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
    """The weights in a directory, {name: float32 tensor}.

    Raises:
        FileNotFoundError: the directory has no weights.
        ValueError: a file is damaged.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        state |= {name: tensor.float() for name, tensor in _read(path).items()}
    return state


def weight_files(directory: Path) -> list[Path]:
    """The files with the weights in a directory: those of an index, one safetensors file, or a pickle.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: the index is damaged.
    """
    files = [directory / SAFETENSORS]
    if (directory / INDEX).is_file():
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = [directory / name for name in sorted(set(index.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory / INDEX} is no index of weights: {error}") from None
    elif not files[0].is_file():
        files = [directory / PICKLE]
    if absent := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{directory} has no weights: wanted {SAFETENSORS}, {INDEX} or {PICKLE}, there is no {absent[0].name}"
        )
    return files


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def names_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Each parameter of a model with all its names in the order of the modules; a tied one has several."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield from names.values()


def fill(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Writes a state into the model, in place; tied tensors may be there under one of their names or under several.

    Args:
        model: the model that is filled.
        state: {name: tensor}.
        where: the file or directory that the state came from, which an error names.

    Raises:
        ValueError: names or shapes are those of another model, tied tensors differ, or weights are not finite.
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
            for name in names:
                if name in state:
                    parameter.copy_(state[name])
                    break
