"""What a task is, and what it needs of a model and of its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL.Image import Image
from torch import Generator, Tensor

from eval import ranks
from eval.options import NoOptions

Example = Mapping[str, Any]
Prediction = dict[str, Any]
Part = Callable[[], list[Any]]
Keep = Callable[[int, Sequence[Part]], list[list[Any]]]
PerImage = dict[str, dict[str, float]]


def compute(_first: int, parts: Sequence[Part]) -> list[list[Any]]:
    """The lists of all parts: the `Keep` that stores nothing."""
    return [part() for part in parts]


def compute_together(_first: int, parts: Sequence[Part]) -> list[list[Any]]:
    """The lists of all parts, each made by one of the ranks: the `Keep` of several that stores nothing."""
    return list(ranks.in_turns(parts))


@runtime_checkable
class Examples(Protocol):
    """A list of examples, or a `datasets.Dataset`, which opens the picture of a row when that is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class TextStates(Protocol):
    """Encoded texts that a model can match with images."""

    def select(self, index: Tensor) -> TextStates:
        """The encoded texts at the positions index (k,) int64, in that order."""
        ...


@runtime_checkable
class RetrievalModel(Protocol):
    """A model that compares images with texts."""

    def embed_images(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Features (n, d) of unit length, by which images and texts are compared, and image tokens (n, t, width)."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, TextStates]:
        """Features (n, d) of unit length and the encoded texts that `match` takes."""
        ...

    def match(self, image_tokens: Tensor, texts: TextStates, similarity: Tensor) -> Tensor:
        """Re-ranking scores (n,) of n pairs of an image and a text.

        Args:
            image_tokens: (n_images, t, width), the tokens of each image.
            texts: n texts, equally many for each image, one image's after another's; of two images and six texts, the
                first three are paired with the first image.
            similarity: (n,), the dot product of the features of each pair.
        """
        ...

    def retrieval_loss(
        self, images: Sequence[Image], texts: Sequence[str], image_ids: Sequence[Any], generator: Generator
    ) -> Tensor:
        """Contrastive and matching loss of n pairs, a scalar.

        Args:
            images: the n images.
            texts: the n texts.
            image_ids: the ids of the n images; all pairs of one image are positives of each other.
            generator: draws the negatives of the matching loss.
        """
        ...


@runtime_checkable
class CaptioningModel(Protocol):
    """A model that says what an image shows."""

    def generate(self, images: Sequence[Image], *, num_beams: int, max_length: int, min_length: int) -> list[str]:
        """One caption for each image, by beam search; lengths count tokens, those of the prompt included."""
        ...

    def captioning_loss(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """Language-modeling loss of one caption for each image, a scalar."""
        ...


@runtime_checkable
class VqaModel(Protocol):
    """A model that answers questions about images."""

    def tokens_of(self, images: Sequence[Image]) -> Tensor:
        """Image tokens (n, t, width)."""
        ...

    def rank_answers(self, images: Tensor, questions: Sequence[str], answers: Sequence[str], k: int) -> Tensor:
        """Scores (n, n_answers) of the answers to n questions, the highest for the best answer.

        Args:
            images: (n, t, width), the tokens of the image of each question, as `tokens_of` returns them.
            questions: the n questions.
            answers: the answers to choose from.
            k: number of candidates, chosen by their first token, that are scored whole; the others score -inf.
        """
        ...

    def vqa_loss(
        self,
        images: Sequence[Image],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        weights: Sequence[Sequence[float]],
    ) -> Tensor:
        """Language-modeling loss of the answers to n questions, a scalar.

        Args:
            images: the image of each question.
            questions: the n questions.
            answers: the answers to each question.
            weights: the weight of each answer.
        """
        ...


class VisionLanguageModel(RetrievalModel, CaptioningModel, VqaModel, Protocol):
    """Every method that a task may call; a model implements those that are in the `needs` of its tasks."""


def _accept(_options: Any, _examples: Examples) -> None:
    """Accepts all options and examples."""


@dataclass(frozen=True)
class Task:
    """A fine-tuning objective and an evaluation.

    Attributes:
        name: name of the task, that of its module in `eval`.
        headline: the metric that tables show first, where data allow it; else that is the first one measured.
        metrics: all metrics that `score` may have, in the order of tables.
        examples: what the task is trained and evaluated on: "pairs" (columns image, image_id, captions) or "questions"
            (image, image_id, question, question_id, answers).
        references: the column that predictions are compared with. Examples where it is empty can be predicted and not
            scored.
        needs: names of the methods of `VisionLanguageModel` that `loss` and `predict` call.
        loss: (model, examples, generator) -> scalar training loss of a list of examples; the generator makes all random
            choices. Where several ranks train together (`eval.ranks`), each is given its share of the examples of a
            forward pass and a generator in the same state, which it leaves in the same state as the others; the mean
            of their losses, weighted by their numbers of examples, is the loss of the pass.
        predict: (model, examples, options, prepared, keep=compute) -> one JSON-able prediction for each sample, in the
            order of the examples; the caller has put the model in evaluation mode. The work is done in parts, numbered
            from 0: `keep(first, parts)` returns the lists of the parts that are numbered from `first` on, calling those
            that are not stored yet, in any process. A part that was stored, as JSON with NaN and infinity, gives the
            same predictions, and neither opens its images nor runs the model on them. What a number stands for depends
            on examples, options and code alone.
        score: (predictions, examples) -> {metric: value}; pure, without a model.
        floors: (training examples, test examples, options) -> {name of a floor: {metric: value}}, what is reached
            without learning.
        options: dataclass of the task's options, frozen and strict, every one with a default.
        check: (options, examples without images) -> None; raises a ValueError of one line where the metrics cannot be
            computed.
        prepare: (training examples) -> what `predict` gets as `prepared`; None: nothing is prepared, and training
            examples are not needed to predict.
        per_image: (predictions, examples) -> {metric: {image id as text: pseudo-value}}, see `eval.pseudo`; pure. With
            it comparisons know what another sample of images would change; None: they have the seeds alone.
        submission: the fields of a prediction that EvalAI takes, its id and its text; None: EvalAI takes none.
        extra: {metric: a function that raises a RuntimeError where it cannot be computed}, the metrics that `score`
            computes only when its keyword `extra` names them.
    """

    name: str
    headline: str
    metrics: tuple[str, ...]
    examples: Literal["pairs", "questions"]
    references: Literal["captions", "answers"]
    needs: frozenset[str]
    loss: Callable[..., Tensor]
    predict: Callable[..., list[Prediction]]
    score: Callable[..., dict[str, float]]
    floors: Callable[[Examples, Examples, Any], dict[str, dict[str, float]]]
    options: type = NoOptions
    check: Callable[[Any, Examples], None] = _accept
    prepare: Callable[[Examples], Any] | None = None
    per_image: Callable[..., PerImage] | None = None
    submission: tuple[str, str] | None = None
    extra: Mapping[str, Callable[[], None]] = field(default_factory=dict)


def columns(examples: Examples, *names: str) -> list[dict[str, Any]]:
    """The examples with the named columns alone, so that a `datasets.Dataset` opens no pictures."""
    select = getattr(examples, "select_columns", None)
    rows = select(list(names)) if select else examples
    return [{name: row[name] for name in names} for row in rows]


def align(
    predictions: Sequence[Prediction], examples: Examples, *, key: str, said: str, wanted: str
) -> list[tuple[Any, Any]]:
    """Pairs of the field `said` of a prediction and the field `wanted` of the example with the same `key`.

    They are in the order of the examples.

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


def by_id(rows: Examples, key: str, field: str, what: str) -> dict[str, Any]:
    """{str(row[key]): row[field]}: the ids 5 and "5" are the same, as files and data sets do not agree on their type.

    Args:
        rows: predictions or examples.
        key: name of the field of ids.
        field: name of the field of values.
        what: what the rows are, for errors.

    Raises:
        ValueError: a row without one of the fields, a repeated id, or no row at all.
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


def pick_captions(examples: Examples, generator: Generator) -> list[str]:
    """One caption of each example, drawn by the generator, which draws for the examples of all ranks."""
    share, total = ranks.share(len(examples))
    draws = torch.rand(total, generator=generator, dtype=torch.float64)[share].tolist()
    return [example["captions"][int(draw * len(example["captions"]))] for example, draw in zip(examples, draws)]
