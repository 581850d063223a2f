"""The look at models and data before a sweep, so that what cannot be run is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch

from eval import get_task
from vlprune.config import DENSE, ConfigError, ModelConfig, RunConfig, TaskConfig
from vlprune.data import calibration_batches, left_out
from vlprune.masks import already_sparse
from vlprune.models import ModelAdapter, load_model
from vlprune.stages.examples import check_can, check_metrics, examples, few_answers, missed_answers, seen_in_training
from vlprune.stages.masks import settings_read

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
    for named in dict.fromkeys(config.model for config in configs):
        own = [config for config in configs if config.model == named]
        model = _load(f"model {named.name!r}", lambda named=named: load_model(named.name, named.options))
        _check_model(named, model, own)
        _calibrate(model, [config for config in own if _reads_calibration(config)], skip_broken=skip_broken)
    missing: dict[str, None] = {}
    best = {config.task for config in configs if config.finetuning.select == "best"}
    for task in dict.fromkeys(config.task for config in configs):
        for split in (task.train, task.test, *(["val"] if task in best else [])):
            missing |= dict.fromkeys(_check_split(task, split, skip_broken=skip_broken))
        for split in (task.test, *(["val"] if task in best else [])):
            try:
                check_metrics(task, split, skip_broken=skip_broken)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(f"{_examples(task, split)}: {error}") from None
    if any(config.finetuning.precision == "bf16" for config in configs) and (trap := _slow_bf16()):
        log.warning(f"finetuning.precision is bf16, {trap}")
    return list(missing)


def _slow_bf16() -> str | None:
    """Why bf16 is slow here; None where the device computes it."""
    processor = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or any(there for name, there in processor.items() if name.endswith("bf16")):
        return None
    name = processor.get("cpu_name", processor["architecture"])
    return f"which is several times slower than fp32 here: this processor ({name}) has no instructions for it"


def _check_model(named: ModelConfig, model: ModelAdapter, configs: Iterable[RunConfig]) -> None:
    if trap := already_sparse(model):
        log.warning(f"model {named.name!r}: {trap}")
    for task in dict.fromkeys(config.task for config in configs):
        try:
            check_can(model, task, f"model {named.name!r}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if task.image_size is not None:
            try:
                model.resize_images(task.image_size)
            except ValueError as error:
                raise ConfigError(f"model {named.name!r} cannot do {task.name}: {error}") from None
        if trap := seen_in_training(model, task, named.name):
            log.warning(trap)


def _reads_calibration(config: RunConfig) -> bool:
    return config.pruning.method != DENSE and "calibration.data" in settings_read(config.pruning.method)


def _calibrate(model: ModelAdapter, configs: Iterable[RunConfig], *, skip_broken: bool) -> None:
    """Reads the first batch of every calibration."""
    for data, size in dict.fromkeys((config.calibration.data, config.calibration.batch_size) for config in configs):
        draw = partial(calibration_batches, data, model, n_batches=1, batch_size=size, seed=0, skip_broken=skip_broken)
        _load(f"calibration data {data!r}", lambda draw=draw: list(draw()))


def _check_split(task: TaskConfig, split: str, *, skip_broken: bool) -> list[str]:
    """The images of a split that are left out."""
    found = _load(_examples(task, split), lambda: examples(task, split, skip_broken=skip_broken))
    chosen = get_task(task.name)
    traps = [missed_answers(task, found) if split == task.train else None]
    traps.append(few_answers(task, found) if split == task.test else None)
    for trap in filter(None, traps):
        log.warning(f"{task.data}: {trap}")
    missing = left_out(task.data, chosen.examples, split, task.limit) if skip_broken else []
    return [f"{task.data}: {image}" for image in missing]


def _examples(task: TaskConfig, split: str) -> str:
    return f"the {split} examples of {task.name} in {task.data!r}"


def _load(what: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except Exception as error:
        # Whatever a broken file raises would fail every run alike.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"cannot load {what}: {reason}") from error
