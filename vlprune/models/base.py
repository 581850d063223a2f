"""ModelAdapter: what pruning and fine-tuning need of a vision-language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from vlprune.batch import Batch
from vlprune.graph import BipartiteLayer, LayerGraph
from vlprune.models.images import ImageInput

Config = dict[str, Any]
TASKS = ("retrieval", "captioning", "vqa")


class ModelAdapter(nn.Module):
    """A vision-language model as a layer graph, with what calibration and the tasks ask of it.

    A family provides what is marked abstract, and of the interface of the tasks (`eval.base`) what its `tasks` need.

    Attributes:
        family: key in FAMILIES.
        tasks: names of the tasks that the model can be fine-tuned for.
        uses_regions: whether pretraining and calibration look at regions of images.
        scored_losses: names of the pretraining losses whose sum the gradient methods differentiate.
        excluded: parts of the names of modules that are never pruned.
        image: how pictures become pixels.
        config: settings that `models.checkpoints.build` makes a model of the same shape from.
        valid: {stream: which positions are no padding (n, length), None for all}, during a recorded pass.
    """

    family: str
    tasks: tuple[str, ...] = TASKS
    uses_regions: bool = False
    scored_losses: tuple[str, ...]
    excluded: tuple[str, ...]

    def __init__(self, image: ImageInput) -> None:
        super().__init__()
        self.image = image
        self.config: Config = {}
        self.valid: dict[str, Tensor | None] = {}

    # ---- what a family provides ----

    @abstractmethod
    def modality_of(self, module: str) -> str:
        """ "vision", "text" or "fusion"."""

    @abstractmethod
    def stream_of(self, module: str) -> str:
        """The stream (a key of `valid` during a recorded pass) that feeds a module."""

    def layer_of(self, parameter: str) -> str:
        """The graph's name of the layer that a parameter belongs to, of the copies that a task head makes too."""
        return parameter.removesuffix(".weight")

    def add_task_head(self, task: str) -> None:
        """Gives the model, in place, the modules that a task fine-tunes, from the present weights; none here."""

    @abstractmethod
    def resize_images(self, size: int) -> None:
        """Makes the model take images of another size, in place; position embeddings are interpolated.

        Raises:
            ValueError: a size that is no multiple of the patches'.
        """

    @abstractmethod
    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """{loss name: scalar}; recorded passes inside (`recording`) feed the activation statistics."""

    @abstractmethod
    def calibration_forward(self, batch: Batch) -> None:
        """The recorded passes alone, without losses."""

    # ---- the graph ----

    @property
    def graph(self) -> LayerGraph:
        """Every linear weight outside the heads, in module order, a shared one once."""
        return self._graph

    @cached_property
    def _graph(self) -> LayerGraph:
        names: dict[int, list[str]] = {}
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear) and not any(part in name for part in self.excluded):
                names.setdefault(id(module.weight), []).append(name)
        layers = []
        for name, *aliases in names.values():
            n_out, n_in = self.weight(name).shape
            layers.append(
                BipartiteLayer(name, (n_out, n_in), self.modality_of(name), self.stream_of(name), tuple(aliases))
            )
        return LayerGraph(tuple(layers))

    def weight(self, name: str) -> nn.Parameter:
        """The weight of a layer of the graph."""
        return self.get_parameter(f"{name}.weight")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @contextmanager
    def recording(self, **streams: Tensor | None) -> Iterator[None]:
        """A pass whose layer inputs count for the statistics; streams name the valid positions (None: all)."""
        self.valid = streams
        try:
            yield
        finally:
            self.valid = {}

    # ---- inputs ----

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised pixels (n, 3, size, size) on the model's device."""
        return self.image.pixels(images, self.device)
