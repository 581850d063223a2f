"""Recalls of retrieval: texts for images and images for texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Real
from torch import Tensor

LEVELS = (1, 5, 10)
METRICS = ("tr_r1", "tr_r5", "tr_r10", "tr_mean", "ir_r1", "ir_r5", "ir_r10", "ir_mean", "r_mean", "rsum")


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
        tr_r1, tr_r5, tr_r10, tr_mean, ir_r1, ..., r_mean, the mean of tr_mean and ir_mean, and rsum, the sum of the six
        recalls, at most 600; not rounded.

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
    return summary(_ranks(i2t, right), _ranks(t2i, right.T))


def _ranks(
    scores: Real[np.ndarray, "queries candidates"], right: Bool[np.ndarray, "queries candidates"]
) -> Int[np.ndarray, " queries"]:
    """Wrong candidates before the first right one, wrong ones first among equals."""
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} retrieval scores are NaN")
    best = np.array([row[mask].max() for row, mask in zip(scores, right)])
    return ((scores >= best[:, None]) & ~right).sum(1)


def summary(tr_ranks: Sequence[int] | np.ndarray, ir_ranks: Sequence[int] | np.ndarray) -> dict[str, float]:
    """The metrics of the ranks, counted from 0, of the first right text of each image and of the image of each text."""
    tr, ir = ([100 * float(np.mean(np.asarray(ranks) < k)) for k in LEVELS] for ranks in (tr_ranks, ir_ranks))
    return named(tr, ir)


def named(tr: Sequence[float] | np.ndarray, ir: Sequence[float]) -> dict[str, float]:
    """The metrics of the recalls at LEVELS, of texts and of images."""
    tr_mean, ir_mean = sum(tr) / len(LEVELS), sum(ir) / len(LEVELS)
    values = (*tr, tr_mean, *ir, ir_mean, (tr_mean + ir_mean) / 2, sum((*tr, *ir)))
    return dict(zip(METRICS, values, strict=True))


def chance(counts: Sequence[int]) -> tuple[list[float], list[float]]:
    """The expected recalls at LEVELS, of texts and of images, of a random order of the images with these many captions.

    None of c captions is among k of N random texts with probability C(N - c, k) / C(N, k).
    """
    total = sum(counts)
    tr = [100 * float(np.mean([1 - _misses(total, c, k) for c in counts])) for k in LEVELS]
    return tr, [100 * min(k, len(counts)) / len(counts) for k in LEVELS]


def _misses(total: int, right: int, k: int) -> float:
    """Probability that k draws without replacement from total contain none of the right ones."""
    return float(np.prod([max(total - right - i, 0) / (total - i) for i in range(min(k, total))]))
