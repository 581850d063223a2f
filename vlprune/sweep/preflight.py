"""The look at models and data before a sweep, so that what cannot be run is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from datasets import Dataset

from eval import get_task
from eval.retrieval import LEVELS
from vlprune.config import DENSE, ConfigError, RunConfig, TaskConfig
from vlprune.data import annotation_files, broken_images, calibration_batches, guards, load_answers
from vlprune.masks import already_sparse
from vlprune.models import ModelAdapter, load_model
from vlprune.pipeline import examples

log = logging.getLogger(__name__)
T = TypeVar("T")


def preflight(configs: Iterable[RunConfig], *, skip_broken: bool = False) -> list[str]:
    """Loads every model and every data set of the configs once, and warns of known traps.

    Args:
        configs: what will run.
        skip_broken: whether images that cannot be read are left out.

    Returns:
        The annotations of the images that are left out, with the reasons.

    Raises:
        ConfigError: the first model or data set that cannot be loaded or does not fit its task, in one line.
    """
    configs = list(configs)
    for name in dict.fromkeys(config.model for config in configs):
        own = [config for config in configs if config.model == name]
        model = _load(f"model {name!r}", lambda name=name: load_model(name))
        _check_model(name, model, own)
        _calibrate(model, [config for config in own if config.pruning.method != DENSE], skip_broken=skip_broken)
    left_out: dict[str, None] = {}
    best = {config.task for config in configs if config.finetuning.select == "best"}
    for task in dict.fromkeys(config.task for config in configs):
        for split in (task.train, task.test, *(["val"] if task in best else [])):
            left_out |= dict.fromkeys(_check_split(task, split, skip_broken=skip_broken))
    if not torch.cuda.is_available() and any(config.finetuning.precision == "bf16" for config in configs):
        log.warning("finetuning.precision is bf16, which is many times slower than fp32 on most processors")
    return list(left_out)


def _check_model(name: str, model: ModelAdapter, configs: Iterable[RunConfig]) -> None:
    if trap := already_sparse(model):
        log.warning(f"model {name!r}: {trap}")
    for task in dict.fromkeys(config.task for config in configs):
        if task.name not in model.tasks:
            raise ConfigError(f"model {name!r} cannot do {task.name}; it can do: {', '.join(model.tasks)}")
        if task.image_size is not None:
            try:
                model.resize_images(task.image_size)
            except ValueError as error:
                raise ConfigError(f"model {name!r} cannot do {task.name}: {error}") from None
        if get_task(task.name).examples == "questions":
            files = annotation_files(task.data, "questions")
            trap = guards.seen_in_training(name, str(model.config.get("trained_for", "")), files, task.test)
            if trap:
                log.warning(trap)


def _calibrate(model: ModelAdapter, configs: Iterable[RunConfig], *, skip_broken: bool) -> None:
    """Reads the first batch of every calibration."""
    for data, size in dict.fromkeys((config.calibration.data, config.calibration.batch_size) for config in configs):
        draw = partial(calibration_batches, data, model, n_batches=1, batch_size=size, seed=0, skip_broken=skip_broken)
        _load(f"calibration data {data!r}", lambda draw=draw: list(draw()))


def _check_split(task: TaskConfig, split: str, *, skip_broken: bool) -> list[str]:
    """The images of a split that are left out."""
    what = f"the {split} examples of {task.name} in {task.data!r}"
    found = _load(what, lambda: examples(task, split, skip_broken=skip_broken))
    kind = get_task(task.name).examples
    if split != task.train:
        _check_scored(task, found, what)
    if kind == "questions" and split == task.train and (listed := load_answers(task.data)) is not None:
        trap = guards.missed_answers(listed, found.select_columns("answers").to_list())
        if trap:
            log.warning(f"{task.data}: {trap}")
    return broken_images(task.data, kind, split, task.limit) if skip_broken else []


def _check_scored(task: TaskConfig, found: Dataset, what: str) -> None:
    """Whether the metrics can be computed on the examples of a split."""
    if task.name == "retrieval":
        texts = sum(map(len, found.select_columns("captions")["captions"]))
        if texts < LEVELS[-1]:
            raise ConfigError(f"retrieval counts the right ones among {LEVELS[-1]} texts, {what} have {texts}")
        if task.k_test < LEVELS[-1]:
            raise ConfigError(f"task.k_test of retrieval must be at least {LEVELS[-1]}, got {task.k_test}")
    if get_task(task.name).examples == "questions":
        asked = found.select_columns(["question_id", "answers"]).to_list()
        if single := [row["question_id"] for row in asked if len(row["answers"]) == 1]:
            raise ConfigError(
                f"the accuracy of VQA leaves one person out and needs at least 2 answers to a question, in {what} "
                f"{len(single)} have 1, the first is question_id {single[0]!r}"
            )


def _load(what: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except Exception as error:
        # Whatever a broken file raises would fail every run alike.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"cannot load {what}: {reason}") from error
