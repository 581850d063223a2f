"""One run: model, statistics, masks, fine-tuning, evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from datasets import Dataset

from eval import get_task
from eval.base import Settings
from vlprune import cost
from vlprune.calibrate.rows import Rows
from vlprune.config import DENSE, RunConfig, TaskConfig
from vlprune.data import annotation_files, guards, load_answers, load_pairs, load_questions
from vlprune.finetune.augment import PaperAugmentation
from vlprune.finetune.loop import finetune
from vlprune.finetune.sampler import Captions, Change, Example, unchanged
from vlprune.masking import cached_masks
from vlprune.masks import apply_masks, measure
from vlprune.models import ModelAdapter, load_model

logger = logging.getLogger(__name__)
EXAMPLES = {"questions": load_questions, "pairs": load_pairs}
REFERENCES = {"questions": "answers", "pairs": "captions"}  # what predictions are compared with


@dataclass(frozen=True)
class Outcome:
    """What a run measured.

    Attributes:
        metrics: {metric: value}, as the task names them; none where the test split has nothing to compare with.
        floors: {floor: {metric: value}}, what a model that learned nothing gets.
        predictions: one a sample.
        sparsity: measured fraction of zeros among the prunable entries, after fine-tuning.
        layer_sparsity: {layer name: measured fraction}.
        seconds: {stage: seconds}.
        peak_memory: bytes, of the process.
    """

    metrics: dict[str, float]
    floors: dict[str, dict[str, float]]
    predictions: list[dict[str, Any]]
    sparsity: float
    layer_sparsity: dict[str, float]
    seconds: dict[str, float]
    peak_memory: int


def run(
    config: RunConfig,
    cache: Path,
    needs: Set[str] = frozenset(),
    new_rows: Callable[[], Rows] = Rows,
    *,
    skip_broken: bool = False,
    workers: int = 0,
) -> Outcome:
    """The whole method.

    Args:
        config: what changes the numbers.
        cache: directory of statistics and masks, shared by the runs of a sweep.
        needs: statistics that other methods of the sweep want too, so that one calibration pass measures them all.
        new_rows: makes a store of gradient rows, for the methods that need them.
        skip_broken: leave out images that are missing or cannot be read.
        workers: processes that read the training images.
    """
    watch = _Stopwatch()
    cost.reset_peak()
    set_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with watch("load"):
        model = load_model(config.model).to(device)
        task = get_task(config.task.name)
        splits = [config.task.train, config.task.test, *(["val"] if config.finetuning.select == "best" else [])]
        train, test, *val = (examples(config.task, split, skip_broken=skip_broken) for split in splits)
        prepared = _prepare(config.task, train)
    with watch("prune"):
        masks = None
        if config.pruning.method != DENSE:
            masks = cached_masks(config, model, cache, needs, new_rows, skip_broken=skip_broken)
            apply_masks(model, masks)

    def predict(data: Dataset) -> list[dict[str, Any]]:
        with torch.inference_mode():
            return task.predict(model, data, config.task, prepared)

    def headline(data: Dataset) -> float:
        return task.score(predict(data), _columns(data))[task.headline]

    with watch("finetune"):
        if config.task.image_size is not None:
            model.resize_images(config.task.image_size)
        # Fresh weights and dropout do not depend on whether the masks came from the cache.
        set_seed(config.seed)
        model.add_task_head(task.name)
        finetune(
            model,
            masks or {},
            model.layer_of,
            _epoch(config, train),
            task.loss,
            config.finetuning,
            config.seed,
            change=_change(config, model),
            score=partial(headline, *val) if val else None,
            workers=workers,
        )
    with watch("evaluate"):
        predictions, references = predict(test), _columns(test)
        scored = any(row[REFERENCES[task.examples]] for row in references)
        metrics = task.score(predictions, references) if scored else {}
        floors = task.floors(_columns(train), references) if scored else {}
    return Outcome(
        metrics=metrics,
        floors=floors,
        predictions=predictions,
        sparsity=measure(model),
        layer_sparsity={layer.name: float((model.weight(layer.name) == 0).float().mean()) for layer in model.graph},
        seconds=watch.seconds,
        peak_memory=cost.peak(),
    )


def examples(task: TaskConfig, split: str, *, skip_broken: bool = False) -> Dataset:
    """The examples of a split, or of several as in "train+val", that a task wants."""
    return EXAMPLES[get_task(task.name).examples](task.data, split, task.limit, skip_broken=skip_broken)


def _prepare(task: TaskConfig, train: Dataset) -> Any:
    """What `predict` needs: of questions the answer list that the data comes with, else what the task makes."""
    chosen = get_task(task.name)
    listed = load_answers(task.data) if chosen.examples == "questions" else None
    return chosen.prepare(_columns(train)) if listed is None else listed


def _epoch(config: RunConfig, train: Dataset) -> Sequence[Example]:
    """The examples of an epoch; where epochs are counted, an image comes with each of its captions by itself."""
    pairs = get_task(config.task.name).examples == "pairs"
    whole = config.finetuning.epochs is not None
    return cast(Sequence[Example], Captions(train) if pairs and whole else train)


def _change(config: RunConfig, model: ModelAdapter) -> Change:
    return unchanged if config.finetuning.augment == "none" else PaperAugmentation(model.image.size, config.seed)


def evaluate(
    model: ModelAdapter, task: str, data: str, split: str = "test", settings: Settings | None = None
) -> dict[str, float]:
    """{metric: value} of the model as it is, without fine-tuning; known traps of the data are warnings.

    Raises:
        ValueError: an unknown task, or one that the model cannot do.
    """
    config = TaskConfig(name=task, data=data)
    chosen = get_task(task)
    if task not in model.tasks:
        raise ValueError(f"the model cannot do {task}; it can do: {', '.join(model.tasks)}")
    test, train = examples(config, split), examples(config, config.train)
    prepared = _prepare(config, train)
    if chosen.examples == "questions":
        seen = guards.seen_in_training(
            "the model", model.config.get("trained_for", ""), annotation_files(data, "questions"), split
        )
        missed = guards.missed_answers(prepared, train.select_columns("answers").to_list())
        for trap in filter(None, (seen, missed)):
            logger.warning("%s: %s", data, trap)
    with torch.inference_mode():
        predictions = chosen.predict(model, test, settings or config, prepared)
    return chosen.score(predictions, _columns(test))


def _columns(data: Dataset) -> list[dict[str, Any]]:
    """The rows without their pictures."""
    return data.remove_columns("image").to_list()


@dataclass
class _Stopwatch:
    """Seconds of named stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
