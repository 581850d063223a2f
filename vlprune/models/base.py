"""ModelAdapter: what pruning, calibration, fine-tuning and the tasks need of a vision-language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from eval.options import NoOptions
from vlprune.batch import Batch
from vlprune.graph import BipartiteLayer, LayerGraph
from vlprune.models.images import ImageInput

Config = dict[str, Any]


class ModelAdapter(nn.Module):
    """A vision-language model as a layer graph, with what calibration and the tasks ask of it.

    A family provides the methods marked abstract. Of the tasks' interface (`eval.base.VisionLanguageModel`) it provides
    the methods that it can; `can` says which tasks that is enough for.

    Attributes:
        family: the family's name, a key of `registry.FAMILIES`.
        options: dataclass (of `config.validated`) of the family's options; every field defaults to None, which leaves
            the model as its checkpoint says.
        uses_regions: whether pretraining and calibration look at regions of images.
        scored_losses: names of the pretraining losses whose sum the gradient methods differentiate.
        excluded: parts of the names of modules that are never pruned, such as "vision_proj".
        image: how pictures become pixels.
        config: plain values that describe the model, from which one of the same shape can be built.
        attention_masks: during a recorded pass, {stream: attention mask (n, length) bool, None where no position is
            padding}; empty otherwise.
    """

    family: ClassVar[str]
    options: ClassVar[type] = NoOptions
    uses_regions: bool = False
    scored_losses: tuple[str, ...]
    excluded: tuple[str, ...]

    def __init__(self, image: ImageInput) -> None:
        super().__init__()
        self.image = image
        self.config: Config = {}
        self.attention_masks: dict[str, Tensor | None] = {}

    # ---- what a family provides ----

    @abstractmethod
    def modality_of(self, module: str) -> str:
        """The modality of a module: "vision", "text" or "fusion"."""

    @abstractmethod
    def stream_of(self, module: str) -> str:
        """The stream that feeds a module, a key of `attention_masks` during a recorded pass."""

    def layer_of(self, parameter: str) -> str:
        """The graph's name of the layer that a parameter belongs to.

        A parameter that a task head copied from a layer belongs to that layer, whose mask then applies to both.
        """
        return parameter.removesuffix(".weight")

    def add_task_head(self, task: str) -> None:
        """Gives the model, in place, the modules that a task fine-tunes, made of the present weights.

        Nothing is added for a task that needs no modules of its own; neither is it for one that the family does not
        know by name.
        """

    @abstractmethod
    def resize_images(self, size: int) -> None:
        """Makes the model take images of another size, in place; position embeddings are interpolated.

        Raises:
            ValueError: the size is no multiple of the patch size.
        """

    @abstractmethod
    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The pretraining losses of a batch, {name: scalar}.

        Passes that are recorded (see `recording`) feed the statistics of activations.
        """

    def n_samples(self, batch: Batch) -> int:
        """The number of samples in a batch that the pretraining losses are means over: its pairs."""
        return len(batch.images)

    @abstractmethod
    def calibration_forward(self, batch: Batch) -> None:
        """Runs the recorded passes over a batch alone, without losses."""

    # ---- options and tasks ----

    def apply_options(self, options: Any) -> None:
        """Sets, in place, the options that are given; the others stay as the checkpoint says.

        Args:
            options: an instance of the class's `options`. A saved model keeps what they set.
        """
        given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) is not None}
        for name, value in given.items():
            setattr(self, name, value)
        self.config = {**self.config, **given}

    def can(self, needs: Collection[str]) -> bool:
        """Whether the model has the methods that a task calls, such as {"generate", "captioning_loss"}."""
        return not self.lacks(needs)

    def lacks(self, needs: Collection[str]) -> tuple[str, ...]:
        """Those of the methods that a task calls that this model has not, in alphabetical order."""
        return tuple(name for name in sorted(needs) if not callable(getattr(self, name, None)))

    # ---- the graph ----

    @property
    def graph(self) -> LayerGraph:
        """Every linear weight outside the heads, in the order of the modules; a tied one is there once."""
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
        """The weight (out, in) of a layer of the graph."""
        return self.get_parameter(f"{name}.weight")

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.parameters()).device

    @contextmanager
    def recording(self, **attention_masks: Tensor | None) -> Iterator[None]:
        """A context in which the inputs of layers count for the statistics.

        Args:
            attention_masks: for each stream that is recorded its attention mask (n, length) bool, None where no
                position is padding, as in `recording(image=None, text=tokens.attention_mask)`.
        """
        self.attention_masks = attention_masks
        try:
            yield
        finally:
            self.attention_masks = {}

    # ---- inputs ----

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised pixels (n, 3, size, size) on the model's device."""
        return self.image.pixels(images, self.device)
