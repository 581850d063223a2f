"""Image-text retrieval: candidates by ITC similarity, re-ranked by image-text matching.

`python -m eval.retrieval predictions references` scores stored predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor

from eval import command
from eval.base import (
    Examples,
    Keep,
    PerImage,
    Prediction,
    RetrievalModel,
    Task,
    TextStates,
    by_id,
    columns,
    compute,
    pick_captions,
)
from eval.options import STRICT, AtLeastOne
from eval.pseudo import of_mean
from eval.recalls import LEVELS, METRICS, chance, named, recalls, summary

__all__ = ["TASK", "RetrievalOptions", "recalls"]

BATCH = 64  # images or texts embedded at a time
PAIRS = 256  # image-text pairs matched at a time


@dataclass(frozen=True, config=STRICT)
class RetrievalOptions:
    """Options of retrieval.

    Attributes:
        k_test: number of candidates of a query, the most similar ones, that are re-ranked by matching; the recall at 10
            needs at least 10.
        folds: number of parts of the test set, in its order, each searched by itself; 5 on the 5,000 test images of
            COCO is its "1k" evaluation. The recalls are those of all queries, the mean over folds of equal size.
    """

    k_test: AtLeastOne = 16
    folds: AtLeastOne = 1


def loss(model: RetrievalModel, examples: Examples, generator: Generator) -> Float[Tensor, ""]:
    """Contrastive and matching loss of one caption of each example, drawn by the generator."""
    captions = pick_captions(examples, generator)
    images, ids = [example["image"] for example in examples], [example["image_id"] for example in examples]
    return model.retrieval_loss(images, captions, ids, generator)


@torch.inference_mode()
def predict(
    model: RetrievalModel,
    examples: Examples,
    options: RetrievalOptions,
    _prepared: None = None,
    keep: Keep = compute,
) -> list[Prediction]:
    """The ten best of the candidates of every query: first each image in the order of the examples, then each caption.

    Candidates are the options.k_test of the highest ITC similarity in the fold of the query, or as many as the smallest
    fold has, ranked by `model.match`. A pair that is a candidate in both directions is matched once. In memory are the
    tokens of all images and all texts, and of the similarities those of BATCH queries.

    Part 0 is the candidates [of each image, of each text], every further one the scores of the pairs of BATCH texts.
    Images and texts are embedded anew even where parts are stored.

    Returns:
        {"query": "image", "image_id", "ranked": [[image_id, number of its caption], ...]} and
        {"query": "text", "image_id", "caption": its number, "ranked": [image_id, ...]}; wrong ones first among equals.

    Raises:
        ValueError: too few candidates for the recall at 10, repeated image_ids, or scores that are not numbers.
    """
    rows = columns(examples, "image_id", "captions")
    captions = list(by_id(rows, "image_id", "captions", "examples").values())
    ids = [row["image_id"] for row in rows]
    _check_candidates(options, min(LEVELS[-1], sum(len(found) for found in captions)))
    fold = _fold_of(len(ids), options.folds)
    # Texts of like length share a batch, so that there is little padding.
    texts = sorted(
        ((i, j) for i, found in enumerate(captions) for j in range(len(found))), key=lambda t: len(captions[t[0]][t[1]])
    )
    images, image_tokens = _embed_images(model, examples)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    embedded = [model.embed_texts([captions[i][j] for i, j in batch]) for batch in batches]
    sentences = torch.cat([features for features, _ in embedded])

    owner = np.array([i for i, _ in texts])
    [candidates] = keep(0, [partial(_candidates_of_both, images, sentences, fold, fold[owner], options.k_test)])
    of_image, of_text = (np.array(found, dtype=np.int64) for found in candidates)
    image_of_pair = np.concatenate([np.arange(len(ids)).repeat(of_image.shape[1]), of_text.ravel()])
    text_of_pair = np.concatenate([of_image.ravel(), np.arange(len(texts)).repeat(of_text.shape[1])])
    pairs, back = np.unique(text_of_pair * len(ids) + image_of_pair, return_inverse=True)
    pair_texts, pair_images = np.divmod(pairs, len(ids))
    bounds = np.searchsorted(pair_texts, np.arange(len(batches) + 1) * BATCH)
    slices = [slice(*pair) for pair in pairwise(bounds)]
    parts = [
        partial(_match, model, (images, image_tokens), texts_, pair_images[own], pair_texts[own] - number * BATCH)
        for number, (own, texts_) in enumerate(zip(slices, embedded, strict=True))
    ]
    matched = np.array([score for scores in keep(1, parts) for score in scores], dtype=np.float32)

    i2t, t2i = np.split(matched[back], [of_image.size])
    best_texts = _best(of_image, i2t.reshape(of_image.shape), owner[of_image] == np.arange(len(ids))[:, None])
    best_images = _best(of_text, t2i.reshape(of_text.shape), of_text == owner[:, None])
    by_image = [
        {"query": "image", "image_id": image, "ranked": [[ids[texts[t][0]], texts[t][1]] for t in row]}
        for image, row in zip(ids, best_texts)
    ]
    by_text = [
        {"query": "text", "image_id": ids[i], "caption": j, "ranked": [ids[image] for image in row]}
        for (i, j), row in sorted(zip(texts, best_images), key=lambda pair: pair[0])
    ]
    return by_image + by_text


def check(options: RetrievalOptions, examples: Examples) -> None:
    """Whether the recalls can be computed on the examples.

    Raises:
        ValueError: fewer than ten texts in a fold, more folds than images, or fewer candidates than ten.
    """
    counts = [len(row["captions"]) for row in columns(examples, "captions")]
    if options.folds > len(counts):
        raise ValueError(f"wanted at most as many folds as images, got {options.folds} folds of {len(counts)} images")
    texts = int(np.bincount(_fold_of(len(counts), options.folds), counts).min())
    if texts < LEVELS[-1]:
        where = "" if options.folds == 1 else f" in one of {options.folds} folds"
        raise ValueError(f"retrieval counts the right ones among {LEVELS[-1]} texts, and there are {texts}{where}")
    _check_candidates(options, LEVELS[-1])


def _check_candidates(options: RetrievalOptions, needed: int) -> None:
    if options.k_test < needed:
        raise ValueError(
            f"k_test must be at least {needed}: the recall at {LEVELS[-1]} needs as many candidates, "
            f"got {options.k_test}"
        )


def _embed_images(model: RetrievalModel, examples: Examples) -> tuple[Tensor, Tensor]:
    """The features (n, d) and tokens (n, t, width) of the images of the examples, BATCH of them opened at a time."""
    features, image_tokens = [], torch.empty(0)
    for start in range(0, len(examples), BATCH):
        batch = [examples[i]["image"] for i in range(start, min(start + BATCH, len(examples)))]
        feature, tokens = model.embed_images(batch)
        if not start:
            image_tokens = tokens.new_empty((len(examples), *tokens.shape[1:]))
        image_tokens[start : start + len(batch)] = tokens
        features.append(feature)
    return torch.cat(features), image_tokens


def _match(
    model: RetrievalModel,
    images: tuple[Tensor, Tensor],
    texts: tuple[Tensor, TextStates],
    pair_images: Int[np.ndarray, " pairs"],
    pair_texts: Int[np.ndarray, " pairs"],
) -> list[float]:
    """The matching score of each pair, about PAIRS of them at a time, those of an image together.

    Args:
        model: the model that matches images and texts.
        images: features (n, d) and tokens (n, t, width) of images.
        texts: features (m, d) and encoded texts.
        pair_images: the number of each pair's image.
        pair_texts: the number of each pair's text.

    Raises:
        ValueError: scores that are NaN.
    """
    (image_features, image_tokens), (text_features, states) = images, texts
    scores = np.empty(len(pair_images), dtype=np.float32)
    for own in _by_image(pair_images):
        i, t = (torch.from_numpy(x).to(image_features.device) for x in (pair_images[own[:, 0]], pair_texts[own]))
        similarity = (image_features[i][:, None] * text_features[t]).sum(2).flatten()
        scores[own.ravel()] = model.match(image_tokens[i], states.select(t.flatten()), similarity).float().cpu()
    if broken := int(np.isnan(scores).sum()):
        raise ValueError(f"the model matches {broken} of {len(scores)} pairs with NaN")
    return scores.tolist()


def _by_image(pair_images: Int[np.ndarray, " pairs"]) -> Iterator[Int[np.ndarray, "images texts"]]:
    """Positions of about PAIRS pairs at a time, a row for each image: of images that are in equally many pairs.

    The pairs of images 7, 8, 8, 9 are [[0], [3]] and [[1, 2]].
    """
    order = np.argsort(pair_images, kind="stable")
    _, starts, counts = np.unique(pair_images[order], return_index=True, return_counts=True)
    for count in np.unique(counts):
        rows = order[starts[counts == count][:, None] + np.arange(count)]
        together = max(1, PAIRS // count)
        yield from (rows[start : start + together] for start in range(0, len(rows), together))


def _fold_of(images: int, folds: int) -> Int[np.ndarray, " images"]:
    """The number of the fold of each image: [0, 0, 1, 1, 1] of five images in two folds."""
    return np.arange(images) * folds // images


def _candidates_of_both(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    image_fold: Int[np.ndarray, " n"],
    text_fold: Int[np.ndarray, " m"],
    k: int,
) -> list[list[list[int]]]:
    """[the candidate texts of each image, the candidate images of each text], all of the fold of the query."""
    found = []
    for queries, gallery, of_query, of_gallery in (
        (images, texts, image_fold, text_fold),
        (texts, images, text_fold, image_fold),
    ):
        own = min(k, int(np.bincount(of_gallery).min()))
        rows = np.empty((len(queries), own), dtype=np.int64)
        for fold in np.unique(of_query):
            asking, there = np.flatnonzero(of_query == fold), np.flatnonzero(of_gallery == fold)
            rows[asking] = there[_candidates(queries[asking], gallery[there], own)]
        found.append(rows.tolist())
    return found


def _candidates(queries: Float[Tensor, "n d"], gallery: Float[Tensor, "m d"], k: int) -> Int[np.ndarray, "n k"]:
    """The k nearest of the gallery of each query."""
    rows = [(part @ gallery.T).topk(k, dim=1).indices for part in queries.split(BATCH)]
    return torch.cat(rows).cpu().numpy()


def _best(
    candidates: Int[np.ndarray, "queries k"],
    scores: Float[np.ndarray, "queries k"],
    right: Bool[np.ndarray, "queries k"],
) -> Int[np.ndarray, "queries best"]:
    """The first ten of each query's candidates, by falling score, wrong ones first among equals."""
    order = np.lexsort((right, -scores), axis=1)[:, : LEVELS[-1]]
    return np.take_along_axis(candidates, order, axis=1)


def score(predictions: Sequence[Prediction], examples: Examples) -> dict[str, float]:
    """`recalls` of stored predictions; what is not among the ranked is not found.

    Raises:
        ValueError: a query that is missing, unknown or answered twice, or a prediction that is not one.
    """
    found = _ranks_of(predictions, examples)
    tr, ir = ([rank for (_, caption), rank in found.items() if (caption is None) == own] for own in (True, False))
    return summary(tr, ir)


def _ranks_of(predictions: Sequence[Prediction], examples: Examples) -> dict[tuple[str, int | None], int]:
    """{(image id, None or number of a caption): rank, from 0, of the first right answer}, first of all images.

    Raises:
        ValueError: as `score`.
    """
    counts = {key: len(texts) for key, texts in by_id(examples, "image_id", "captions", "references").items()}
    found: dict[tuple[str, int | None], int] = {}
    for number, row in enumerate(predictions, 1):
        if row.get("query") not in ("image", "text") or not {"image_id", "ranked"} <= row.keys():
            raise ValueError(f"number {number} of the predictions has not the fields query, image_id, ranked: {row}")
        query = (str(row["image_id"]), row.get("caption"))
        if query in found:
            raise ValueError(f"image_id {query[0]}, caption {query[1]} occurs twice in the predictions")
        answers = [str(a[0]) if row["query"] == "image" else str(a) for a in row["ranked"]]
        found[query] = answers.index(query[0]) if query[0] in answers else len(counts) + sum(counts.values())
    wanted = [(key, None) for key in counts] + [(key, j) for key, n in counts.items() for j in range(n)]
    if found.keys() != set(wanted):
        odd = next(iter(set(wanted) - found.keys() or found.keys() - set(wanted)))
        raise ValueError(
            f"{len(found)} predictions for {len(wanted)} queries: "
            f"image_id {odd[0]}, caption {odd[1]} is only in one of them"
        )
    return {query: found[query] for query in wanted}


def per_image(predictions: Sequence[Prediction], examples: Examples) -> PerImage:
    """The pseudo-values of each recall for each image, with those of its captions.

    Raises:
        ValueError: as `score`.
    """
    found = _ranks_of(predictions, examples)
    images = [image for image, caption in found if caption is None]
    owners = [image for image, caption in found if caption is not None]
    tr = np.array([rank for (_, caption), rank in found.items() if caption is None])
    ir = np.array([rank for (_, caption), rank in found.items() if caption is not None])
    by_text = [of_mean(100.0 * (ir < k), owners) for k in LEVELS]
    rows = [
        named(100.0 * (tr[place] < np.array(LEVELS)), [own[image] for own in by_text])
        for place, image in enumerate(images)
    ]
    return {metric: {image: float(row[metric]) for image, row in zip(images, rows)} for metric in METRICS}


def floors(
    _train_examples: Examples, test_examples: Examples, options: RetrievalOptions
) -> dict[str, dict[str, float]]:
    """{"chance": the expected recalls of a random order, exactly}."""
    counts = np.array([len(texts) for texts in by_id(test_examples, "image_id", "captions", "references").values()])
    fold = _fold_of(len(counts), options.folds)
    of_folds = [chance(counts[fold == number].tolist()) for number in range(options.folds)]
    tr = np.average([tr for tr, _ in of_folds], axis=0, weights=np.bincount(fold))
    ir = np.average([ir for _, ir in of_folds], axis=0, weights=np.bincount(fold, counts))
    return {"chance": named(tr.tolist(), ir.tolist())}


TASK = Task(
    name="retrieval",
    headline="r_mean",
    metrics=METRICS,
    examples="pairs",
    references="captions",
    needs=frozenset({"embed_images", "embed_texts", "match", "retrieval_loss"}),
    loss=loss,
    predict=predict,
    score=score,
    floors=floors,
    options=RetrievalOptions,
    check=check,
    per_image=per_image,
)

if __name__ == "__main__":
    command.run(TASK)
