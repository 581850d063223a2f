"""Visual question answering by ranking a list of answers.

`python -m eval.vqa predictions references` scores stored predictions; `python -m eval.vqa predictions [questions]
--evalai FILE` writes them as EvalAI takes them for test-dev.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor

from eval import command
from eval.answers import accuracy, answer_type, exact_match, normalize, normalized_accuracy
from eval.base import (
    Examples,
    Keep,
    PerImage,
    Prediction,
    Task,
    VqaModel,
    align,
    by_id,
    columns,
    compute,
)
from eval.options import STRICT, AtLeastOne
from eval.pseudo import of_mean

IMAGES = 64  # images encoded at a time, whose questions are a part of the evaluation
QUESTIONS = 128  # questions answered at a time
ANSWERS = 3129  # of the usual answer list of VQA v2
TYPES = ("yes_no", "number", "other")


@dataclass(frozen=True, config=STRICT)
class VqaOptions:
    """Options of visual question answering.

    Attributes:
        k_test: number of candidate answers, chosen by their first token, that are ranked by their whole sequence.
    """

    k_test: AtLeastOne = 16


def answer_list(train_examples: Examples, size: int = ANSWERS) -> list[str]:
    """The most frequent normalised answers of the training examples, ties in alphabetical order.

    Raises:
        ValueError: no training examples.
    """
    counts = Counter(_target(answer) for example in train_examples for answer in example["answers"])
    if not counts:
        raise ValueError("the answer list is made of the training examples, and there are none")
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:size]


def _target(answer: str) -> str:
    """What a model learns to say: an answer of articles alone ("a") normalises to nothing and stays itself."""
    return normalize(answer) or answer


def loss(model: VqaModel, examples: Examples, _generator: Generator) -> Float[Tensor, ""]:
    """Language-modeling loss of each example's distinct answers, weighted by the share of people who gave them.

    The loss of an example is multiplied by its `weight` where it has one, 0.5 for Visual Genome. Answers are
    normalised, so that those learned are those of `answer_list`; the code of MULTIFLOW trains on them as written.
    """
    counts = [Counter(map(_target, example["answers"])) for example in examples]
    return model.vqa_loss(
        [example["image"] for example in examples],
        [example["question"] for example in examples],
        [list(count) for count in counts],
        [
            [example.get("weight", 1.0) * n / count.total() for n in count.values()]
            for example, count in zip(examples, counts, strict=True)
        ],
    )


@torch.inference_mode()
def predict(
    model: VqaModel,
    examples: Examples,
    options: VqaOptions,
    answers: Sequence[str],
    keep: Keep = compute,
) -> list[Prediction]:
    """{"question_id", "answer"} of each example: the best of `answers` among the options.k_test first candidates.

    An image is opened and encoded once, however many questions it has; IMAGES images are in memory at a time, and a
    part is the predictions of all their questions.

    Raises:
        ValueError: the model's scores are not numbers.
    """
    asked = columns(examples, "image_id", "question", "question_id")
    of_image: dict[object, list[int]] = {}
    for i, row in enumerate(asked):
        of_image.setdefault(row["image_id"], []).append(i)

    def answer(groups: Sequence[list[int]]) -> list[Prediction]:
        """The predictions of groups of questions, each group about one image."""
        tokens = model.tokens_of([examples[group[0]]["image"] for group in groups])
        questions = [(place, i) for place, group in enumerate(groups) for i in group]
        # Questions of like length share a batch, so that there is little padding.
        by_length = sorted(questions, key=lambda question: len(asked[question[1]]["question"]))
        chosen: dict[int, str] = {}
        for start in range(0, len(by_length), QUESTIONS):
            batch = by_length[start : start + QUESTIONS]
            places = torch.tensor([place for place, _ in batch], device=tokens.device)
            texts = [asked[i]["question"] for _, i in batch]
            scores = model.rank_answers(tokens[places], texts, answers, min(options.k_test, len(answers)))
            if scores.isnan().any():
                near = asked[batch[0][1]]["question_id"]
                raise ValueError(f"the model scores answers with NaN (question_id {near} or near it)")
            best: list[int] = scores.argmax(1).tolist()
            chosen.update((i, answers[index]) for (_, i), index in zip(batch, best))
        return [{"question_id": asked[i]["question_id"], "answer": chosen[i]} for _, i in questions]

    images = list(of_image.values())
    made = keep(0, [partial(answer, images[start : start + IMAGES]) for start in range(0, len(images), IMAGES)])
    order = (i for group in images for i in group)
    predictions = dict(zip(order, (row for rows in made for row in rows), strict=True))
    return [predictions[i] for i in range(len(asked))]


def check(_options: VqaOptions, examples: Examples) -> None:
    """Refuses examples on which `score` cannot be computed; those that all have no answers are not scored.

    Raises:
        ValueError: questions with no, one and several answers in one set.
    """
    rows = columns(examples, "question_id", "answers")
    kinds = {min(len(row["answers"]), 2): row for row in reversed(rows)}
    if len(kinds) > 1:
        few, many = min(kinds), max(kinds)
        raise ValueError(
            "wanted questions that all have one answer (exact match), several (VQA accuracy) or none; "
            + " and ".join(f"{kinds[n]['question_id']!r} has {len(kinds[n]['answers'])}" for n in (few, many))
        )


def score(predictions: Sequence[Prediction], examples: Examples) -> dict[str, float]:
    """The metrics of stored predictions, 0-100, each the mean over the questions that it is about.

    With several answers to a question: "accuracy", the official one; the same of each answer type that there is,
    "yes_no", "number", "other" (the type that the annotations give, else `eval.answers.answer_type`); "normalized", see
    `eval.answers.normalized_accuracy`. With one answer: "exact_match", and that of each type.

    Raises:
        ValueError: predictions and examples have not the same question_ids, or questions have one and several answers.
    """
    return {metric: sum(own.values()) / len(own) for metric, own in _by_question(predictions, examples).items() if own}


def per_image(predictions: Sequence[Prediction], examples: Examples) -> PerImage:
    """The pseudo-values of each metric for each image, with those of all its questions.

    Raises:
        ValueError: as `score`.
    """
    image_of = {key: str(image) for key, image in by_id(examples, "question_id", "image_id", "references").items()}
    images = list(image_of.values())
    return {
        metric: of_mean(list(own.values()), [image_of[question] for question in own], images)
        for metric, own in _by_question(predictions, examples).items()
        if own
    }


def _by_question(predictions: Sequence[Prediction], examples: Examples) -> dict[str, dict[str, float]]:
    """{metric: {question_id: value}}, the questions that each metric is about."""
    questions = by_id(examples, "question_id", "answers", "references")
    pairs = dict(zip(questions, align(predictions, examples, key="question_id", said="answer", wanted="answers")))
    single = all(len(truths) == 1 for truths in questions.values())
    headline = "exact_match" if single else "accuracy"
    values = {
        q: exact_match(said, truths[0]) if single else accuracy(said, truths) for q, (said, truths) in pairs.items()
    }
    given = [str(example.get("answer_type")).replace("/", "_") for example in examples]
    types = [
        own if own in TYPES else answer_type(truths) for own, truths in zip(given, questions.values(), strict=True)
    ]
    found = {headline: values}
    for name in TYPES:
        found[name] = {question: values[question] for question, own in zip(questions, types) if own == name}
    if not single:
        found["normalized"] = {
            question: normalized_accuracy(said, truths) for question, (said, truths) in pairs.items()
        }
    return found


def floors(train_examples: Examples, test_examples: Examples, _options: VqaOptions) -> dict[str, dict[str, float]]:
    """{"most frequent answer", "question only": the metrics of answering without a look at the image}.

    The most frequent answer is that of the training examples. By the question only, it is the most frequent answer to
    the same question, for a new question to its first two words, and where those are new too, of all examples.
    """
    counts: dict[str, Counter[str]] = {}
    for example in train_examples:
        for prior in _priors(example["question"]):
            counts.setdefault(prior, Counter()).update(map(_target, example["answers"]))
    if not counts:
        raise ValueError("the floors of VQA are made of the training examples, and there are none")
    best = {prior: min(count, key=lambda answer: (-count[answer], answer)) for prior, count in counts.items()}
    ids = [example["question_id"] for example in test_examples]
    blind = [next(best[p] for p in _priors(example["question"]) if p in best) for example in test_examples]
    return {
        name: score([{"question_id": i, "answer": a} for i, a in zip(ids, answers)], test_examples)
        for name, answers in (("most frequent answer", [best[""]] * len(ids)), ("question only", blind))
    }


def _priors(question: str) -> tuple[str, str, str]:
    """What an answer can be guessed from, the most telling first; the last is the same for all questions."""
    words = normalize(question).split()
    return f"question {' '.join(words)}", f"start {' '.join(words[:2])}", ""


TASK = Task(
    name="vqa",
    headline="accuracy",
    metrics=("accuracy", "exact_match", *TYPES, "normalized"),
    examples="questions",
    references="answers",
    needs=frozenset({"tokens_of", "rank_answers", "vqa_loss"}),
    loss=loss,
    predict=predict,
    score=score,
    floors=floors,
    options=VqaOptions,
    check=check,
    prepare=answer_list,
    per_image=per_image,
    submission=("question_id", "answer"),
)

if __name__ == "__main__":
    command.run(TASK)
