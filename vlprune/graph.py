"""The prunable part of a model as an ordered set of bipartite layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BipartiteLayer:
    """A weight seen as a bipartite graph: nodes are activations, edges are its entries.

    Attributes:
        name: module name; the weight is the parameter `<name>.weight`. A weight tied to others has one name.
        shape: (out, in), the numbers of output and input nodes.
        modality: "vision", "text" or "fusion".
        stream: the adapter's name of the token positions that feed the layer, so that padding can be left out.
        aliases: names of other modules that share the weight.
    """

    name: str
    shape: tuple[int, int]
    modality: str
    stream: str
    aliases: tuple[str, ...] = ()

    @property
    def n_edges(self) -> int:
        """Number of weight entries."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class LayerGraph:
    """The prunable layers of a model, in the order in which ties between equal scores are broken."""

    layers: tuple[BipartiteLayer, ...]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise ValueError(
                f"layer names must be unique, repeated: {sorted({n for n in names if names.count(n) > 1})}"
            )

    def __iter__(self) -> Iterator[BipartiteLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> BipartiteLayer:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, BipartiteLayer]:
        return {layer.name: layer for layer in self.layers}

    @property
    def n_edges(self) -> int:
        """Number of prunable entries."""
        return sum(layer.n_edges for layer in self.layers)

    @property
    def modality(self) -> dict[str, str]:
        """{layer name: modality}."""
        return {layer.name: layer.modality for layer in self.layers}

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """{layer name: names of other modules that share its weight}, of the layers that have any."""
        return {layer.name: layer.aliases for layer in self.layers if layer.aliases}
