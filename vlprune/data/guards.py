"""Known traps of data sets, as sentences to warn with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.answers import accuracy, normalize

COVERED = 0.5  # share of training answers that an answer list should hold
VQA_MODEL = re.compile(r"(?:^|[^a-z])vqa(?:[^a-z]|$|v?2)|question.?answering", re.IGNORECASE)
VQA_V2 = re.compile(r"v2_OpenEnded_mscoco|(?:^|/)vqa_(?:train|val|test)\w*\.json$|vqa_?v2", re.IGNORECASE)


def seen_in_training(model: str, architecture: str, annotations: Iterable[str], split: str) -> str | None:
    """A warning if a model was trained on the questions that it is evaluated on, else None.

    BLIP's VQA checkpoints are trained on train and val of VQA v2 (Li et al. 2022, arXiv:2201.12086), as are those of
    ALBEF and X-VLM; only test and test-dev are new to them.

    Args:
        model: name, directory or file of the checkpoint.
        architecture: what the model says it was trained for, such as `BlipForQuestionAnswering`; empty if unknown.
        annotations: names of the annotation files or the hub id, as `annotation_files` returns them.
        split: the split that is evaluated, or several as in "train+val".
    """
    known = {name for name in split.split("+") if name in ("train", "val", "validation")}
    if known and any(map(VQA_MODEL.search, (model, architecture))) and any(map(VQA_V2.search, annotations)):
        return (
            f"{model} looks like a checkpoint that is fine-tuned on VQA v2 train+val: it has seen the answers to the "
            f"questions of {split}; those of test-dev it has not (write a file for EvalAI)"
        )
    return None


def missed_answers(answers: Sequence[str], train_examples: Iterable[Mapping[str, Any]]) -> str | None:
    """A warning if an answer list misses most of the answers of the training examples, else None."""
    known = {normalize(answer) or answer for answer in answers}
    given = [normalize(answer) or answer for example in train_examples for answer in example["answers"]]
    found = sum(answer in known for answer in given)
    if given and found < COVERED * len(given):
        return (
            f"the answer list of {len(answers)} answers has only {100 * found / len(given):.0f} % of the {len(given)} "
            "training answers: is it the list of another data set?"
        )
    return None


def few_answers(examples: Iterable[Mapping[str, Any]]) -> str | None:
    """A warning if the accuracy of VQA cannot reach 100, as questions have several answers and fewer than four.

    It was made for ten answers a question: with three, who says what all people say is worth 66.7.
    """
    fewest = min((n for example in examples if (n := len(example["answers"])) > 1), default=4)
    if fewest >= 4:
        return None
    return (
        f"questions have {fewest} answers: the accuracy of VQA, made for 10, is at most "
        f"{accuracy('yes', ['yes'] * fewest):.1f} for them; with one answer a question the metric is the exact match"
    )
