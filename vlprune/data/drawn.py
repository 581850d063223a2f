"""Embedded data sets: pictures that are drawn from a seed, with captions, region phrases and questions.

A set is written once in the same layouts as real data (a Karpathy file, VQA v2 question and annotation files, a list of
region boxes), so that the readers of real annotations read it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        text: the question.
        answers: what ten people answer.
        answer: the right answer.
        kind: type of the question, such as "count".
    """

    text: str
    answers: list[str]
    answer: str
    kind: str


@dataclass(frozen=True)
class Picture:
    """A picture with what is said about it.

    Attributes:
        pixels: (side, side, 3) uint8.
        captions: as several people describe it.
        questions: questions about it.
        regions: (box [x, y, width, height] in pixels, phrase) of the things on it.
    """

    pixels: np.ndarray
    captions: list[str]
    questions: list[Question]
    regions: list[tuple[list[float], str]]


@dataclass(frozen=True)
class DrawnSet:
    """A data set that is drawn.

    Attributes:
        name: name of the set.
        version: to raise when a picture or a text changes; part of the name of its directory and of its fingerprint.
        splits: names of its splits.
        pictures: (split) -> the pictures of a split; raises a ValueError for an unknown one.
    """

    name: str
    version: int
    splits: tuple[str, ...]
    pictures: Callable[[str], Iterable[Picture]]


def distinct(
    signature: Callable[[int], Hashable], start: int, count: int, seen: frozenset[Hashable]
) -> tuple[list[int], frozenset[Hashable]]:
    """The first seeds from `start` on whose signatures are new and differ, and all signatures that are no longer new.

    Args:
        signature: (seed) -> what makes two pictures the same to a viewer.
        start: the first seed to try.
        count: number of seeds.
        seen: signatures that are not new, such as those of other splits.
    """
    known, seeds = set(seen), []
    seed = start
    while len(seeds) < count:
        if (own := signature(seed)) not in known:
            known.add(own)
            seeds.append(seed)
        seed += 1
    return seeds, frozenset(known)


def ten_answers(rng: np.random.Generator, answer: str, groups: Iterable[Iterable[str]]) -> list[str]:
    """Ten people's answers, each with a chance of 5 % another of those that could be meant, as people err.

    Args:
        rng: draws.
        answer: the right answer.
        groups: answers that are mistaken for each other, such as ("yes", "no").
    """
    rivals = next((group for each in groups if answer in (group := tuple(each))), (answer,))
    return [str(rng.choice(rivals)) if rng.random() < 0.05 else answer for _ in range(10)]


def listing(parts: list[str]) -> str:
    """ "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def write(root: Path, drawn: DrawnSet) -> None:
    """Writes a whole set under root: images/, annotations in the Karpathy and VQA v2 layouts, region boxes."""
    (root / "images").mkdir(parents=True)
    karpathy, regions, image_id = [], [], 0
    for split in drawn.splits:
        asked, answered = [], []
        for picture in drawn.pictures(split):
            image_id += 1
            name = f"{image_id:06d}.png"
            Image.fromarray(picture.pixels).save(root / "images" / name, compress_level=1)
            sentences = [{"raw": c, "tokens": c.replace(",", "").split()} for c in picture.captions]
            karpathy.append({"filename": name, "imgid": image_id, "split": split, "sentences": sentences})
            elements = [{"bb": box, "caption": phrase} for box, phrase in picture.regions]
            regions.append({"image": name, "elems": elements})
            for i, question in enumerate(picture.questions):
                key = {"image_id": image_id, "question_id": 10 * image_id + i}
                asked.append({**key, "question": question.text})
                answered.append({**key, **_annotation(question)})
        (root / f"{split}_questions.json").write_text(json.dumps({"questions": asked}))
        (root / f"{split}_annotations.json").write_text(json.dumps({"annotations": answered}))
    (root / "regions.json").write_text(json.dumps(regions))
    (root / f"dataset_{drawn.name}.json").write_text(json.dumps({"dataset": drawn.name, "images": karpathy}))


def _annotation(question: Question) -> Mapping[str, object]:
    return {
        "question_type": question.kind,
        "multiple_choice_answer": question.answer,
        "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(question.answers, 1)],
    }
