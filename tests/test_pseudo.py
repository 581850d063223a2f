"""Pseudo-values: their mean is the metric, and their spread is that of the jackknife."""

import numpy as np
import pytest

from eval import TASKS, captioning, retrieval, vqa
from eval.pseudo import of_mean, of_sums

DRAW = np.random.default_rng(0)
WORDS = ["a", "red", "blue", "green", "circle", "square", "next", "to", "big", "small", "ring", "on", "gray"]


def sentence():
    return " ".join(DRAW.choice(WORDS, DRAW.integers(4, 9)))


def retrieved():
    captions = {f"i{n}": [sentence() for _ in range(1 + n % 3)] for n in range(12)}
    ids = list(captions)
    rows = [
        {"query": "image", "image_id": i, "ranked": [[j, 0] for j in DRAW.permutation(ids)[:10].tolist()]} for i in ids
    ]
    rows += [
        {"query": "text", "image_id": i, "caption": n, "ranked": DRAW.permutation(ids)[:10].tolist()}
        for i in ids
        for n in range(len(captions[i]))
    ]
    return rows, [{"image_id": i, "captions": own} for i, own in captions.items()]


def captioned():
    examples = [{"image_id": n, "captions": [sentence() for _ in range(3)]} for n in range(12)]
    said = [own["captions"][0].rsplit(" ", 1)[0] + " circle" for own in examples]
    return [{"image_id": own["image_id"], "caption": text} for own, text in zip(examples, said)], examples


def answered():
    examples = [
        {"question_id": n, "image_id": n // 3 if n < 15 else 9, "answers": ["red"] * (n % 4) + ["two"] * (4 - n % 4)}
        for n in range(20)
    ]
    return [{"question_id": n, "answer": "red" if n % 3 else "two"} for n in range(20)], examples


MADE = {"retrieval": retrieved, "captioning": captioned, "vqa": answered}


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_of_the_pseudo_values_is_the_metric(task):
    predictions, examples = MADE[task]()
    metrics, found = TASKS[task].score(predictions, examples), TASKS[task].per_image(predictions, examples)
    assert list(found) == list(metrics)
    images = list(dict.fromkeys(str(example["image_id"]) for example in examples))
    for metric, values in found.items():
        assert list(values) == images
        assert np.mean(list(values.values())) == pytest.approx(metrics[metric], abs=1e-9)
        assert np.ptp(list(values.values())) > 0


def test_bleu_has_the_pseudo_values_of_leaving_each_image_out():
    predictions, examples = captioned()
    own = np.array(list(captioning.per_image(predictions, examples)["bleu4"].values()))
    n = len(examples)
    without = np.array(
        [
            captioning.score_predictions(predictions[:i] + predictions[i + 1 :], examples[:i] + examples[i + 1 :])[
                "bleu4"
            ]
            for i in range(n)
        ]
    )
    assert own - own.mean() == pytest.approx(-(n - 1) * (without - without.mean()), abs=1e-6)


def test_the_accuracy_has_nearly_the_pseudo_values_of_leaving_each_image_out():
    """Images have different numbers of questions, so that the mean over the others is no sum over images."""
    predictions, examples = answered()
    own = vqa.per_image(predictions, examples)["accuracy"]
    whole, n = vqa.score(predictions, examples)["accuracy"], len(own)
    for image, value in own.items():
        rest = [n for n, example in enumerate(examples) if str(example["image_id"]) != image]
        without = vqa.score([predictions[n] for n in rest], [examples[n] for n in rest])["accuracy"]
        assert value - whole == pytest.approx((n - 1) * (whole - without), rel=0.35, abs=0.5)


def test_samples_of_one_image_count_together():
    assert of_mean([1.0, 3.0, 8.0], ["b", "b", "a"]) == {
        "b": pytest.approx(4 + 2 / 3 * -4),
        "a": pytest.approx(4 + 2 / 3 * 4),
    }
    recalls = retrieval.per_image(*retrieved())
    assert set(recalls) == set(retrieval.METRICS)


def test_a_ratio_of_sums_that_is_a_mean_has_the_values_themselves():
    counts = np.array([[1.0, 1.0], [2.0, 1.0], [6.0, 1.0]])
    assert of_sums(counts, lambda sums: sums[:, 0] / sums[:, 1]) == pytest.approx([1.0, 2.0, 6.0])
