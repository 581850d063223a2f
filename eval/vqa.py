"""Visual question answering by ranking a list of answers.

`python -m eval.vqa predictions references` scores stored predictions; `python -m eval.vqa predictions [questions]
--evalai FILE` writes them as EvalAI takes them for test-dev.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor

from eval import command
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

_NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# Contractions whose form without an apostrophe is no other word.
_CONTRACTIONS = (  # noqa: SIM905
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've "
    "he's how'd how'll how's i'd've it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't "
    "not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'll somebody's "
    "someone'd someone'll someone's something'd something'll that'd that'd've that's there'd there'd've there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()


def _spellings(word: str) -> Iterable[str]:
    """The word without one or more of its apostrophes."""
    parts = word.split("'")
    for kept in range(2 ** (len(parts) - 1) - 1):
        yield "".join(part + "'" * (kept >> i & 1) for i, part in enumerate(parts))


_APOSTROPHES = {spelling: word for word in _CONTRACTIONS for spelling in _spellings(word)}


@dataclass(frozen=True, config=STRICT)
class VqaOptions:
    """Options of visual question answering.

    Attributes:
        k_test: number of candidate answers, chosen by their first token, that are ranked by their whole sequence.
    """

    k_test: AtLeastOne = 16


@lru_cache(maxsize=1 << 16)
def normalize(answer: str) -> str:
    """The answer as VQA compares it (Antol et al. 2015, arXiv:1505.00468).

    Without punctuation, case and articles, with digits for the numbers to ten and apostrophes in contractions.
    A mark goes away next to a space and becomes a space inside a word; if a comma stands between digits, all marks go.
    A period stays only before a digit: the look-behind that VQA's official code meant has no effect there, nor here.
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    joined = re.search(r"\d,\d", text)
    result = text
    for mark in _MARKS:
        result = result.replace(mark, "" if joined or mark + " " in text or " " + mark in text else " ")
    words = re.sub(r"\.(?!\d)", "", result).lower().split()
    return " ".join(
        _APOSTROPHES.get(word, word) for word in (_NUMBERS.get(w, w) for w in words) if word not in _ARTICLES
    )


def accuracy(answer: str, ground_truths: Sequence[str]) -> float:
    """VQA v2 accuracy of an answer, 0-100: the mean over people of min(1, others who gave the same answer / 3).

    Goyal et al. 2017 (arXiv:1612.00837). Both sides are always normalised; VQA's official code leaves both as they
    are when all people agree, and the copy that BLIP and X-VLM use normalises people's answers by punctuation only, so
    that "2" against ten times "two" scored 0. People are told apart by position, not by their dictionaries being
    unequal.

    Raises:
        ValueError: fewer than two ground truths.
    """
    n = len(ground_truths)
    if n < 2:
        raise ValueError(f"VQA accuracy leaves one person out and needs at least 2 answers, got {n}")
    same = sum(normalize(truth) == normalize(answer) for truth in ground_truths)
    return 100 * (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


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
        ValueError: a question with a single answer, or questions with and without answers.
    """
    rows = columns(examples, "question_id", "answers")
    wanting = [row for row in rows if len(row["answers"]) < 2]
    if any(row["answers"] for row in rows) and wanting:
        first = wanting[0]
        raise ValueError(
            "the accuracy of VQA leaves one person out and needs at least 2 answers to a question; "
            f"{len(wanting)} have fewer, the first is question_id {first['question_id']!r} with {len(first['answers'])}"
        )


def score(predictions: Sequence[Prediction], examples: Examples) -> dict[str, float]:
    """{"accuracy": mean over the questions, 0-100}.

    Raises:
        ValueError: predictions and examples have not the same question_ids.
    """
    pairs = align(predictions, examples, key="question_id", said="answer", wanted="answers")
    return {"accuracy": sum(accuracy(answer, truths) for answer, truths in pairs) / len(pairs)}


def per_image(predictions: Sequence[Prediction], examples: Examples) -> PerImage:
    """The pseudo-values of the accuracy for each image, with those of all its questions.

    Raises:
        ValueError: as `score`.
    """
    pairs = align(predictions, examples, key="question_id", said="answer", wanted="answers")
    images = by_id(examples, "question_id", "image_id", "references").values()
    return {"accuracy": of_mean([accuracy(answer, truths) for answer, truths in pairs], list(map(str, images)))}


def floors(train_examples: Examples, test_examples: Examples) -> dict[str, dict[str, float]]:
    """{"most frequent answer", "question only": accuracies of answering without a look at the image}.

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
    metrics=("accuracy",),
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
