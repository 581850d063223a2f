"""State dicts: read from the files of a directory, checked against a model and written into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlprune.store.documents import read_json
from vlprune.store.tensors import read_tensors

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = f"{SAFETENSORS}.index.json"
# A checkpoint of another library may lack what only pretraining needs.
OPTIONAL = frozenset({"temp"})


def read_state(directory: Path) -> dict[str, Tensor]:
    """The weights in a directory, {name: tensor}, as they are stored.

    Raises:
        FileNotFoundError: the directory has no weights.
        ValueError: a file is damaged.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        state |= read_tensors(path)
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
            names = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is no name of a file beside it")
            files = [directory / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory / INDEX} is no index of weights: {error}") from None
    elif not files[0].is_file():
        files = [directory / PICKLE]
    if absent := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{directory} has no weights: wanted {SAFETENSORS}, {INDEX} or {PICKLE}, there is no {absent[0].name}"
        )
    return files


def names_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Each parameter of a model with all its names in the order of the modules; a tied one has several."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield from names.values()


def check_fits(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Refuses a state of other names or shapes than a model's, which may be one without content (torch's "meta").

    Raises:
        ValueError: names or shapes are those of another model; `where` names the file or directory of the state.
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
        for name in names:
            if name in state and state[name].shape != parameter.shape:
                shape = tuple(state[name].shape)
                raise ValueError(f"{where}: {name} has shape {shape}, wanted {tuple(parameter.shape)}")


def fill(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Writes a state into the model, in place; tied tensors may be there under one of their names or under several.

    Args:
        model: the model that is filled.
        state: {name: tensor}, of any number format.
        where: the file or directory that the state came from, which an error names.

    Raises:
        ValueError: names or shapes are those of another model, tied tensors differ, or weights are not finite; nothing
            has changed then.
    """
    check_fits(model, state, where)
    groups = [(parameter, [name for name in names if name in state]) for parameter, names in names_of(model)]
    for parameter, given in groups:
        for name in given:
            tensor = state[name].to(parameter.dtype)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{where}: {name} holds NaN or infinite weights")
            if name != given[0] and not torch.equal(tensor, state[given[0]].to(parameter.dtype)):
                raise ValueError(f"{where}: {name} and {given[0]} are one tensor of the model, but differ")
    with torch.no_grad():
        for parameter, given in groups:
            if given:
                parameter.copy_(state[given[0]])
