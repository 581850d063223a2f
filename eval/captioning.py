"""Image captioning: BLEU-4, ROUGE-L, CIDEr, on request METEOR and SPICE.

`python -m eval.captioning predictions references` scores stored predictions.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor

from eval import command
from eval.base import (
    CaptioningModel,
    Examples,
    Keep,
    PerImage,
    Prediction,
    Task,
    align,
    by_id,
    columns,
    compute,
    pick_captions,
)
from eval.options import STRICT, AtLeastOne
from eval.pseudo import of_sums
from eval.ptb import words

BATCH = 64  # images captioned at a time, which are a part of the evaluation


@dataclass(frozen=True, config=STRICT)
class CaptioningOptions:
    """Options of captioning, all of beam search.

    Attributes:
        num_beams: number of beams.
        max_length: the most tokens of a caption, those of the prompt included.
        min_length: the fewest tokens of a caption, those of the prompt included.
    """

    num_beams: AtLeastOne = 3
    max_length: AtLeastOne = 30
    min_length: AtLeastOne = 5

    def __post_init__(self) -> None:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length must be at least min_length = {self.min_length}, got {self.max_length}")


def score(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, extra: Sequence[str] = ()
) -> dict[str, float]:
    """{"bleu4", "rougel", "cider"} and what `extra` names, ×100, by pycocoevalcap on the words of `eval.ptb`.

    CIDEr (Vedantam et al. 2015, arXiv:1411.5726) takes its document frequencies from these references, so its value
    depends on how many images are scored together; on one image it is 0. The tokenizer of `eval.ptb` needs no Java.

    Args:
        captions: one caption for each image.
        references: for each caption, in the same order, at least one text that it is compared with, such as
            [["a cat", "a pet"], ["a dog"]].
        extra: names of further metrics, "meteor" (needs Java) and "spice" (needs Java and Stanford CoreNLP 3.6.0, which
            is never downloaded here).

    Raises:
        ValueError: no captions, not as many as references, an image without reference, an unknown extra metric.
        RuntimeError: Java or the models of SPICE are missing or fail.
    """
    if unknown := [name for name in extra if name not in EXTRA]:
        raise ValueError(f"unknown extra metric {unknown[0]!r}; there are: {', '.join(EXTRA)}")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, wanted = _tokenized(captions, references)
    result = {
        "bleu4": Bleu(4).compute_score(wanted, said, verbose=0)[0][3],
        "rougel": Rouge().compute_score(wanted, said)[0],
        "cider": Cider().compute_score(wanted, said)[0],
    }
    java = {"meteor": _meteor, "spice": _spice}
    result |= {name: java[name](said, wanted) for name in extra}
    return {name: 100 * float(value) for name, value in result.items()}


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Captions and references as pycocoevalcap takes them, or a ValueError where they do not belong together."""
    if not captions or len(captions) != len(references):
        raise ValueError(f"wanted one caption for each set of references, got {len(captions)} for {len(references)}")
    if lacking := [i for i, texts in enumerate(references) if not texts or isinstance(texts, str)]:
        raise ValueError(
            f"references must be a list of texts for each caption; number {lacking[0]} is {references[lacking[0]]!r}"
        )
    said = {i: [" ".join(words(text))] for i, text in enumerate(captions)}
    return said, {i: [" ".join(words(text)) for text in texts] for i, texts in enumerate(references)}


def _meteor(said: dict[int, list[str]], wanted: dict[int, list[str]]) -> float:
    """METEOR 1.5 (Denkowski and Lavie 2014), 0-1."""
    _need_meteor()
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    process = scorer.meteor_p
    try:
        return scorer.compute_score(wanted, said)[0]
    except (OSError, ValueError):
        process.kill()
        message = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
        cause = message.split("\n")[0] or "it ended without a message"
        raise RuntimeError(f"METEOR's Java process failed: {cause}") from None
    finally:  # the library leaves pipes open and, after a failure, a lock closed that its __del__ waits for
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # text that a dead process did not take
                pipe.close()  # type: ignore[union-attr]
        if scorer.lock.locked():
            scorer.lock.release()


def _spice(said: dict[int, list[str]], wanted: dict[int, list[str]]) -> float:
    """SPICE 1.0 (Anderson et al. 2016, arXiv:1607.08822), 0-1."""
    _need_spice()
    from pycocoevalcap.spice.spice import Spice

    try:
        return float(Spice().compute_score(wanted, said)[0])
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"SPICE's Java process failed: {error}") from None


def _need_meteor() -> None:
    _need_java("METEOR")


def _need_spice() -> None:
    _need_java("SPICE")
    package = find_spec("pycocoevalcap.spice")
    folder = Path(next(iter(package.submodule_search_locations))) / "lib"  # type: ignore[union-attr,arg-type]
    jars = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    if missing := [name for name in jars if not (folder / name).exists()]:
        raise RuntimeError(
            f"SPICE needs {' and '.join(missing)} in {folder}; "
            "pycocoevalcap.spice.get_stanford_models.get_stanford_models() downloads them, or leave 'spice' out"
        )


def _need_java(metric: str) -> None:
    if shutil.which("java") is None:
        raise RuntimeError(
            f"{metric} needs Java, and there is no `java` on the path; install it or leave the metric out"
        )


EXTRA = {"meteor": _need_meteor, "spice": _need_spice}


def score_predictions(
    predictions: Sequence[Prediction], examples: Examples, *, extra: Sequence[str] = ()
) -> dict[str, float]:
    """`score` of predictions {"image_id", "caption"}, each against the captions of the example of its image_id."""
    captions, references = zip(*align(predictions, examples, key="image_id", said="caption", wanted="captions"))
    return score(captions, references, extra=extra)


def per_image(predictions: Sequence[Prediction], examples: Examples) -> PerImage:
    """The pseudo-values of each metric for each image; CIDEr keeps the document frequencies of all references.

    Raises:
        ValueError: as `score`.
    """
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = zip(*align(predictions, examples, key="image_id", said="caption", wanted="captions"))
    said, wanted = _tokenized(captions, references)
    cooked = [cook_test(said[i][0], cook_refs(wanted[i])) for i in said]
    counts = [[*c["correct"], *c["guess"], c["testlen"], _closest(c["reflen"], c["testlen"])] for c in cooked]
    values = {
        "bleu4": of_sums(np.array(counts, float), _bleu4),
        "rougel": Rouge().compute_score(wanted, said)[1],
        "cider": Cider().compute_score(wanted, said)[1],
    }
    images = list(by_id(examples, "image_id", "captions", "references"))
    return {name: dict(zip(images, (100 * np.asarray(own)).tolist(), strict=True)) for name, own in values.items()}


def _closest(lengths: Sequence[int], length: int) -> int:
    """The length of a reference that is nearest to that of a caption, of two the smaller."""
    return min((abs(own - length), own) for own in lengths)[1]


def _bleu4(sums: Float[np.ndarray, "k counts"]) -> Float[np.ndarray, " k"]:
    """BLEU-4, 0-1, as pycocoevalcap computes it.

    Args:
        sums: correct n-grams (4), n-grams of the captions (4), words of the captions, words of the references.
    """
    correct, guessed, said, wanted = sums[:, :4], sums[:, 4:8], sums[:, 8], sums[:, 9]
    precision = np.prod((correct + 1e-15) / (guessed + 1e-9), axis=1) ** 0.25
    ratio = (said + 1e-15) / (wanted + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def loss(model: CaptioningModel, examples: Examples, generator: Generator) -> Float[Tensor, ""]:
    """Language-modeling loss of one caption of each example, drawn by the generator."""
    return model.captioning_loss([example["image"] for example in examples], pick_captions(examples, generator))


@torch.inference_mode()
def predict(
    model: CaptioningModel,
    examples: Examples,
    options: CaptioningOptions,
    _prepared: None = None,
    keep: Keep = compute,
) -> list[Prediction]:
    """{"image_id", "caption"} of each example, by beam search; a part is the predictions of BATCH images."""

    def caption(start: int) -> list[Prediction]:
        batch = [examples[i] for i in range(start, min(start + BATCH, len(examples)))]
        captions = model.generate(
            [example["image"] for example in batch],
            num_beams=options.num_beams,
            max_length=options.max_length,
            min_length=options.min_length,
        )
        return [{"image_id": e["image_id"], "caption": text} for e, text in zip(batch, captions, strict=True)]

    parts = [partial(caption, start) for start in range(0, len(examples), BATCH)]
    return [row for rows in keep(0, parts) for row in rows]


def check(_options: CaptioningOptions, examples: Examples) -> None:
    """Refuses examples on which `score` cannot be computed.

    Raises:
        ValueError: some images have captions and others have none.
    """
    rows = columns(examples, "image_id", "captions")
    bare = [row["image_id"] for row in rows if not row["captions"]]
    if 0 < len(bare) < len(rows):
        raise ValueError(
            f"captions are scored against those of every image, and of {len(rows)} images {len(bare)} have none, "
            f"the first is image_id {bare[0]!r}"
        )


def floors(
    train_examples: Examples, test_examples: Examples, _options: CaptioningOptions
) -> dict[str, dict[str, float]]:
    """{"constant caption": metrics where every image gets the most frequent training caption}.

    Captions are counted by their words; of equally frequent ones the first is taken.
    """
    counts = Counter(" ".join(words(caption)) for example in train_examples for caption in example["captions"])
    if not counts:
        raise ValueError("the floor of captioning is a training caption, and there are none")
    constant = counts.most_common(1)[0][0]
    references = list(by_id(test_examples, "image_id", "captions", "references").values())
    return {"constant caption": score([constant] * len(references), references)}


TASK = Task(
    name="captioning",
    headline="cider",
    metrics=("bleu4", "rougel", "cider", *EXTRA),
    examples="pairs",
    references="captions",
    needs=frozenset({"generate", "captioning_loss"}),
    loss=loss,
    predict=predict,
    score=score_predictions,
    floors=floors,
    options=CaptioningOptions,
    check=check,
    per_image=per_image,
    submission=("image_id", "caption"),
    extra=EXTRA,
)

if __name__ == "__main__":
    command.run(TASK)
