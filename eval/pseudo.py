"""Pseudo-values: what each image of a test set has to do with a metric.

The pseudo-values of a metric are a number for each image, whose mean is the metric and whose spread tells how far the
metric would move on other images: their standard error is the metric's (Tukey's jackknife; Miller 1974, The jackknife
- a review, Biometrika 61). All that is said about an image, such as the answers to its questions, is in its number, so
that samples of one image never count as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float


def of_mean(
    values: Sequence[float] | np.ndarray, image_of: Sequence[str], images: Sequence[str] | None = None
) -> dict[str, float]:
    """The pseudo-values of a mean over samples of which an image has several, such as questions.

    Args:
        values: the value of each sample.
        image_of: the id of the image of each sample, such as ["7", "7", "8"].
        images: the ids of all images, where some have no sample, such as no question about a number; None: all have.

    Returns:
        {image id: mean + images / samples * the sum of its samples' differences to the mean}, in the order of the ids.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(image_of if images is None else images))}
    mean = np.mean(values)
    own = [places[name] for name in image_of]
    sums = np.bincount(own, np.asarray(values, float) - mean, minlength=len(places))
    return dict(zip(places, (mean + len(places) / len(values) * sums).tolist(), strict=True))


def of_sums(
    counts: Float[np.ndarray, "images counts"], metric: Callable[[Float[np.ndarray, "k counts"]], np.ndarray]
) -> Float[np.ndarray, " images"]:
    """The pseudo-values of a metric that is computed from sums over images, such as BLEU.

    They are those of the jackknife, all moved by one number, so that their mean is the metric.

    Args:
        counts: what is summed, of each image.
        metric: sums (k, counts) -> metrics (k,).
    """
    total = counts.sum(0)
    whole, without = metric(total[None])[0], metric(total - counts)
    return whole - (len(counts) - 1) * (without - without.mean())
