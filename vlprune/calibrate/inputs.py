"""Inputs of the layers of a model in its recorded passes, summed by forward hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from vlprune.graph import BipartiteLayer

HELD = 4 << 20  # bytes of inputs to hold, because many small tensors are summed faster together


class Recorded(Protocol):
    """What the hooks need of a model."""

    @property
    def attention_masks(self) -> Mapping[str, Tensor | None]: ...  # noqa: D102
    def get_submodule(self, target: str) -> nn.Module: ...  # noqa: D102


class Inputs:
    """Running sums of products of inputs, by forward pre-hooks; layers that read one tensor share their sums.

    Args:
        model: with the layers; `attention_masks` says which streams are recorded and which of their positions count.
        layers: the layers to measure.
        outer: whether the products of the inputs of two nodes are summed too.

    Attributes:
        active: whether the hooks record what they see.
    """

    def __init__(self, model: Recorded, layers: Sequence[BipartiteLayer], *, outer: bool) -> None:
        self.model, self.layers, self.outer = model, layers, outer
        self.held = 0 if outer else HELD
        self.active = False
        # A layer, what it read, and the attention mask over the positions of that (None: all count).
        self.reads: list[tuple[str, Tensor, Tensor | None]] = []
        self.n_bytes = 0
        # By the readers of k tensors that were summed at once: sums (k, in) float64 and (k, in, in).
        self.sums: dict[tuple[tuple[str, ...], ...], dict[str, Tensor]] = {}
        self.sequences: Counter[tuple[tuple[str, ...], ...]] = Counter()

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
            streams = self.model.attention_masks
            if not self.active or stream not in streams:
                return
            x = args[0]
            if self.n_bytes > self.held and x is not self.reads[-1][1]:
                self.add()
            self.reads.append((name, x, streams[stream]))
            self.n_bytes += x.nbytes

        return look

    @torch.no_grad()
    def add(self) -> None:
        """Adds what was read and not yet added, and lets go of it; no layer changes its input in place."""
        # Query, key and value read one tensor, all keys and values of cross-attention the image's.
        alike: dict[tuple[torch.Size, int], dict[int, list[str]]] = {}
        tensors: dict[int, Tensor] = {}
        masks: dict[int, Tensor | None] = {}
        for name, x, mask in self.reads:
            tensors[id(x)], masks[id(mask)] = x, mask
            alike.setdefault((x.shape, id(mask)), {}).setdefault(id(x), []).append(name)
        for (shape, mask), readers in alike.items():
            key = tuple(map(tuple, readers.values()))
            self.sequences[key] += shape[0]
            sums = self._sums(torch.stack([tensors[x] for x in readers]).flatten(1, -2), masks[mask])
            if key in self.sums:
                for kind, value in sums.items():
                    self.sums[key][kind] += value
            else:
                self.sums[key] = sums
        self.reads.clear()
        self.n_bytes = 0

    def _sums(self, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Sums over the tokens (k, tokens, in), which are overwritten."""
        if mask is not None:
            tokens.mul_(mask.flatten()[:, None])
        # As large as weights, so in float32.
        sums = {"input_outer": tokens.mT @ tokens} if self.outer else {}
        # Float64 makes the sums over batches independent of how these were cut, to float32.
        sums["input_sq"] = tokens.square_().sum(1).double()
        return sums

    def means(self, name: str) -> dict[str, Tensor]:
        """{statistic: its sums divided by the number of sequences, float32} of a layer."""
        n_sequences, totals = 0, {}
        for key, sums in self.sums.items():
            # A layer that read one tensor in two passes is there twice.
            for i in [i for i, names in enumerate(key) for reader in names if reader == name]:
                n_sequences += self.sequences[key]
                totals = {kind: totals[kind] + rows[i] if totals else rows[i] for kind, rows in sums.items()}
        if not totals:
            raise RuntimeError(f"no input reached layer {name}: its module never ran in a recorded pass")
        means = {kind: (total / n_sequences).float() for kind, total in totals.items()}
        if not means["input_sq"].sum().isfinite():
            raise RuntimeError(f"the inputs of layer {name} are not finite")
        return means
