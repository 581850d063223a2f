"""What a task is, and what it needs of a model and of its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from torch import Generator, Tensor

Example = Mapping[str, Any]
Prediction = dict[str, Any]


class TextStates(Protocol):
    """Encoded texts that a model can match with images."""

    def select(self, index: Tensor) -> TextStates:
        """The texts at positions index (k,) int64, in that order."""
        ...


class VisionLanguageModel(Protocol):
    """What the tasks need of a model; the vlprune adapters have it."""

    def embed_images(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Unit features (n, d) and tokens (n, t, width)."""
        ...

    def tokens_of(self, images: Sequence[Image]) -> Tensor:
        """Tokens (n, t, width); a model without features has them too."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, TextStates]:
        """Unit features (n, d) and the states that `match` takes."""
        ...

    def match(self, image_tokens: Tensor, texts: TextStates, similarity: Tensor) -> Tensor:
        """Re-ranking scores (n,) of n pairs: image_tokens (n, t, width), n texts, their ITC similarity (n,)."""
        ...

    def retrieval_loss(
        self, images: Sequence[Image], texts: Sequence[str], image_ids: Sequence[Any], generator: Generator
    ) -> Tensor:
        """ITC + ITM of n pairs; pairs of the same image_id are all positives; the generator draws the negatives."""
        ...

    def generate(self, images: Sequence[Image], *, num_beams: int, max_length: int, min_length: int) -> list[str]:
        """One caption an image; lengths in tokens, prompt included."""
        ...

    def captioning_loss(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """Language-model loss of n captions."""
        ...

    def rank_answers(self, images: Tensor, questions: Sequence[str], answers: Sequence[str], k: int) -> Tensor:
        """Scores (n, n_answers), -inf beyond the k first candidates; images are tokens_of's (n, t, width)."""
        ...

    def vqa_loss(
        self,
        images: Sequence[Image],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        weights: Sequence[Sequence[float]],
    ) -> Tensor:
        """Language-model loss of the answers to n questions, each answer with its weight."""
        ...


class Settings(Protocol):
    """How a model is evaluated.

    Attributes:
        k_test: candidates that are re-ranked (retrieval by ITM, VQA by sequence loss).
        num_beams: beams of caption generation.
        max_length: most tokens of a caption, prompt included.
        min_length: fewest tokens of a caption, prompt included.
    """

    @property
    def k_test(self) -> int: ...  # noqa: D102
    @property
    def num_beams(self) -> int: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def min_length(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Task:
    """A fine-tuning objective and an evaluation.

    Attributes:
        name: key in eval.TASKS.
        version: raised whenever the numbers of `score` or `predict` change.
        headline: the metric that tables show first.
        metrics: all metrics of `score`, in the order of tables.
        examples: "pairs" (columns image, image_id, captions) or "questions" (image, image_id, question, question_id,
            answers): what the task is trained and evaluated on.
        loss: (model, examples, generator) -> scalar training loss of a list of examples; the generator makes all random
            choices.
        prepare: (train examples) -> what predict needs of them: the answer list of VQA, else None.
        predict: (model, examples, settings, prepared) -> one JSON-able prediction a sample, in the order of the
            examples; the caller has put the model in evaluation mode.
        score: (predictions, examples) -> {metric: value}; pure, without a model.
        floors: (train examples, test examples) -> {floor name: {metric: value}}, got without learning.
    """

    name: str
    version: int
    headline: str
    metrics: tuple[str, ...]
    examples: Literal["pairs", "questions"]
    loss: Callable[..., Tensor]
    prepare: Callable[[Sequence[Example]], Any]
    predict: Callable[..., list[Prediction]]
    score: Callable[[Sequence[Prediction], Sequence[Example]], dict[str, float]]
    floors: Callable[[Sequence[Example], Sequence[Example]], dict[str, dict[str, float]]]


def no_preparation(_train_examples: Sequence[Example]) -> None:
    """Nothing: the `prepare` of a task that predicts without the training examples."""


def align(
    predictions: Sequence[Prediction], examples: Sequence[Example], *, key: str, said: str, wanted: str
) -> list[tuple[Any, Any]]:
    """(prediction[said], example[wanted]) in the order of the examples, matched by the field `key`.

    Raises:
        ValueError: an example without a prediction or the reverse, or what `by_id` refuses.
    """
    given, references = by_id(predictions, key, said, "predictions"), by_id(examples, key, wanted, "references")
    missing, unknown = [k for k in references if k not in given], [k for k in given if k not in references]
    if missing or unknown:
        shown = ", ".join((missing or unknown)[:3])
        fault = f"{len(missing)} references have no prediction" if missing else f"{len(unknown)} have no reference"
        raise ValueError(f"{len(given)} predictions for {len(references)} references: {fault} ({key} {shown})")
    return [(given[k], reference) for k, reference in references.items()]


def by_id(rows: Sequence[Mapping[str, Any]], key: str, field: str, what: str) -> dict[str, Any]:
    """{str(row[key]): row[field]}: the ids 5 and "5" are the same, as files and data sets do not agree on their type.

    Raises:
        ValueError: a row without one of the fields, a repeated id, or no row at all; `what` names the rows.
    """
    found: dict[str, Any] = {}
    for number, row in enumerate(rows, 1):
        for name in (key, field):
            if name not in row:
                raise ValueError(f"number {number} of the {what} has no {name!r}; it has: {', '.join(row)}")
        if str(row[key]) in found:
            raise ValueError(f"{key} {row[key]} occurs twice in the {what}")
        found[str(row[key])] = row[field]
    if not found:
        raise ValueError(f"there are no {what}")
    return found


def pick_captions(examples: Sequence[Example], generator: Generator) -> list[str]:
    """One caption of each example, drawn by the generator."""
    draws = torch.rand(len(examples), generator=generator, dtype=torch.float64).tolist()
    return [example["captions"][int(draw * len(example["captions"]))] for example, draw in zip(examples, draws)]
