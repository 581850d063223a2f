"""Inputs: what reaches the layers of a model in its recorded passes, by forward hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from vlprune.graph import BipartiteLayer


class Recorded(Protocol):
    """What the hooks need of a model."""

    @property
    def valid(self) -> Mapping[str, Tensor | None]: ...  # noqa: D102
    def get_submodule(self, target: str) -> nn.Module: ...  # noqa: D102


@dataclass
class _Read:
    """A tensor that layers of a stream read in a recorded pass, and the sums over its valid tokens."""

    tensor: Tensor
    sums: dict[str, Tensor]
    layers: list[str]


class Inputs:
    """Running sums of products of inputs, by forward pre-hooks; layers that read one tensor share their sums."""

    def __init__(self, model: Recorded, layers: Sequence[BipartiteLayer], *, outer: bool) -> None:
        self.model, self.layers, self.outer = model, layers, outer
        self.active = False
        self.sums: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.sequences: Counter[tuple[str, ...]] = Counter()
        self.valid: Mapping[str, Tensor | None] = {}
        self.reads: dict[str, _Read] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the layers while inside, none afterwards; they look at inputs while `active`."""
        handles = []
        try:
            for layer in self.layers:
                module = self.model.get_submodule(layer.name)
                handles.append(module.register_forward_pre_hook(self._hook(layer.name, layer.stream)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, stream: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            valid = self.model.valid
            if not self.active or stream not in valid:
                return
            if valid is not self.valid:
                self.add()
                self.valid = valid
            # Query, key and value read one tensor, all keys and values of cross-attention the image's.
            read = self.reads.get(stream)
            if read is None or read.tensor is not args[0]:
                if read is not None:
                    self._add(read)
                self.reads[stream] = read = _Read(args[0], self._sums(args[0].detach(), valid[stream]), [])
            read.layers.append(name)

        return look

    def _sums(self, x: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        squares = x.square()
        if valid is not None:
            squares.mul_(valid[..., None])
        # Float64 makes the sums over batches independent of how these were cut, to float32.
        sums = {"input_sq": squares.sum(tuple(range(x.ndim - 1))).double()}
        if self.outer:
            # As large as a weight, so in float32.
            tokens = x.flatten(0, -2)
            sums["input_outer"] = (tokens if valid is None else tokens * valid.flatten()[:, None]).T @ tokens
        return sums

    def add(self) -> None:
        """Adds what was read in the last recorded pass, and lets go of it."""
        for read in self.reads.values():
            self._add(read)
        self.reads, self.valid = {}, {}

    def _add(self, read: _Read) -> None:
        key = tuple(read.layers)
        self.sequences[key] += len(read.tensor)
        if key in self.sums:
            for kind, value in read.sums.items():
                self.sums[key][kind] += value
        else:
            self.sums[key] = read.sums

    def means(self, name: str) -> dict[str, Tensor]:
        """{statistic: sums over the number of sequences, float32}."""
        keys = [key for key in self.sums if name in key]
        if not keys:
            raise RuntimeError(f"no input reached layer {name}: its module never ran in a recorded pass")
        means = self.sums[keys[0]]
        for key in keys[1:]:
            means = {kind: mean + self.sums[key][kind] for kind, mean in means.items()}
        n_sequences = sum(self.sequences[key] for key in keys)
        means = {kind: (mean / n_sequences).float() for kind, mean in means.items()}
        if not means["input_sq"].sum().isfinite():
            raise RuntimeError(f"the inputs of layer {name} are not finite")
        return means
