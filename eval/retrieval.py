"""Image-text retrieval: candidates by ITC similarity, re-ranked by image-text matching.

`python -m eval.retrieval predictions references` scores stored predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
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

LEVELS = (1, 5, 10)
BATCH = 64  # images or texts embedded at a time
PAIRS = 256  # image-text pairs matched at a time
METRICS = ("tr_r1", "tr_r5", "tr_r10", "tr_mean", "ir_r1", "ir_r5", "ir_r10", "ir_mean", "r_mean")


@dataclass(frozen=True, config=STRICT)
class RetrievalOptions:
    """Options of retrieval.

    Attributes:
        k_test: number of candidates of a query, the most similar ones, that are re-ranked by matching; the recall at 10
            needs at least 10.
    """

    k_test: AtLeastOne = 16


def recalls(
    scores_i2t: Real[np.ndarray, "images texts"] | Real[Tensor, "images texts"],
    scores_t2i: Real[np.ndarray, "texts images"] | Real[Tensor, "texts images"],
    image_of_text: Int[np.ndarray, " texts"] | Int[Tensor, " texts"] | Sequence[int],
) -> dict[str, float]:
    """Recall at 1, 5, 10 ×100: tr_* of texts for an image (its best-ranked caption counts), ir_* of images for a text.

    Ties are decided against the model: a wrong candidate comes before a right one of the same score, so that equal
    scores are never found to be right. The code of MULTIFLOW leaves ties to an unstable sort, so its recall of
    candidates that were not re-ranked, all of them -100, is arbitrary (it matters where k_test < 10); here they come
    last.

    Args:
        scores_i2t: (n_images, n_texts), of every text for each image, higher for what is more alike.
        scores_t2i: (n_texts, n_images), of every image for each text.
        image_of_text: (n_texts,), the index of the image of each text, such as [0, 0, 1, 1] for two images with two
            texts each; every image has at least one text.

    Returns:
        tr_r1, tr_r5, tr_r10, tr_mean, ir_r1, ..., and r_mean, the mean of tr_mean and ir_mean; not rounded.

    Raises:
        ValueError: shapes that do not fit, NaN scores, an image without text.
    """
    i2t, t2i, owner = (np.asarray(x) for x in (scores_i2t, scores_t2i, image_of_text))
    n_images, n_texts = i2t.shape
    if t2i.shape != (n_texts, n_images) or owner.shape != (n_texts,):
        raise ValueError(
            "wanted scores (images, texts) and (texts, images) and the image of each text (texts,), "
            f"got {i2t.shape}, {t2i.shape} and {owner.shape}"
        )
    if n_images == 0 or not np.array_equal(np.unique(owner), np.arange(n_images)):
        raise ValueError(f"image_of_text must name each of the {n_images} images at least once and no other")
    right = owner == np.arange(n_images)[:, None]
    return _summary(_ranks(i2t, right), _ranks(t2i, right.T))


def _ranks(
    scores: Real[np.ndarray, "queries candidates"], right: Bool[np.ndarray, "queries candidates"]
) -> Int[np.ndarray, " queries"]:
    """Wrong candidates before the first right one, wrong ones first among equals."""
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} retrieval scores are NaN")
    best = np.array([row[mask].max() for row, mask in zip(scores, right)])
    return ((scores >= best[:, None]) & ~right).sum(1)


def _summary(tr_ranks: Sequence[int] | np.ndarray, ir_ranks: Sequence[int] | np.ndarray) -> dict[str, float]:
    """The metrics of the ranks, counted from 0, of the first right text of each image and of the image of each text."""
    tr, ir = ([100 * float(np.mean(np.asarray(ranks) < k)) for k in LEVELS] for ranks in (tr_ranks, ir_ranks))
    return _named(tr, ir)


def _named(tr: Sequence[float] | np.ndarray, ir: Sequence[float]) -> dict[str, float]:
    tr_mean, ir_mean = sum(tr) / len(LEVELS), sum(ir) / len(LEVELS)
    return dict(zip(METRICS, (*tr, tr_mean, *ir, ir_mean, (tr_mean + ir_mean) / 2), strict=True))


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

    Candidates are the options.k_test of the highest ITC similarity, ranked by `model.match`. A pair that is a candidate
    in both directions is matched once. In memory are the tokens of all images and all texts, and of the similarities
    those of BATCH queries.

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
    # Texts of like length share a batch, so that there is little padding.
    texts = sorted(
        ((i, j) for i, found in enumerate(captions) for j in range(len(found))), key=lambda t: len(captions[t[0]][t[1]])
    )
    images, image_tokens = _embed_images(model, examples)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    embedded = [model.embed_texts([captions[i][j] for i, j in batch]) for batch in batches]
    sentences = torch.cat([features for features, _ in embedded])

    [candidates] = keep(0, [partial(_candidates_of_both, images, sentences, options.k_test)])
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
    owner = np.array([i for i, _ in texts])
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
        ValueError: fewer than ten texts, or fewer candidates than ten.
    """
    texts = sum(len(row["captions"]) for row in columns(examples, "captions"))
    if texts < LEVELS[-1]:
        raise ValueError(f"retrieval counts the right ones among {LEVELS[-1]} texts, and there are {texts}")
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


def _candidates_of_both(images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], k: int) -> list[list[list[int]]]:
    """[the candidate texts of each image, the candidate images of each text]."""
    return [_candidates(images, texts, k).tolist(), _candidates(texts, images, k).tolist()]


def _candidates(queries: Float[Tensor, "n d"], gallery: Float[Tensor, "m d"], k: int) -> Int[np.ndarray, "n k"]:
    """The k nearest of the gallery, or all of a smaller one, of each query."""
    rows = [(part @ gallery.T).topk(min(k, len(gallery)), dim=1).indices for part in queries.split(BATCH)]
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
    return _summary(tr, ir)


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
        _named(100.0 * (tr[place] < np.array(LEVELS)), [own[image] for own in by_text])
        for place, image in enumerate(images)
    ]
    return {metric: {image: float(row[metric]) for image, row in zip(images, rows)} for metric in METRICS}


def floors(_train_examples: Examples, test_examples: Examples) -> dict[str, dict[str, float]]:
    """{"chance": the expected recalls of a random order, exactly}.

    None of c captions is among k of N random texts with probability C(N - c, k) / C(N, k).
    """
    counts = [len(texts) for texts in by_id(test_examples, "image_id", "captions", "references").values()]
    total = sum(counts)
    tr = [100 * float(np.mean([1 - _misses(total, c, k) for c in counts])) for k in LEVELS]
    ir = [100 * min(k, len(counts)) / len(counts) for k in LEVELS]
    return {"chance": _named(tr, ir)}


def _misses(total: int, right: int, k: int) -> float:
    """Probability that k draws without replacement from total contain none of the right ones."""
    return float(np.prod([max(total - right - i, 0) / (total - i) for i in range(min(k, total))]))


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
