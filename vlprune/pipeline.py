"""A run as its chain of stages: model → statistics → masks → fine-tuning → evaluation → record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from eval import get_task
from vlprune.calibrate.collect import Statistics
from vlprune.config import DENSE, CalibrationConfig, PruningConfig, RunConfig, TaskConfig, build
from vlprune.execution import Execution
from vlprune.masks import Masks
from vlprune.models import ModelAdapter
from vlprune.stages.examples import (
    check_can,
    check_metrics,
    columns,
    examples,
    few_answers,
    missed_answers,
    prepared,
    seen_in_training,
)
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.masks import masks_stage
from vlprune.stages.predictions import Predictions, predictions_stage
from vlprune.stages.record import record_stage
from vlprune.stages.stage import Bench, Stage, obtain
from vlprune.stages.tuned import Tuned, tuned_stage
from vlprune.store.record import Record
from vlprune.store.weights import settle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chain:
    """The stages of a run, each made from the one before; a dense run has neither statistics nor masks."""

    statistics: tuple[Stage[Statistics], ...]
    masks: Stage[Masks] | None
    tuned: Stage[Tuned]
    predictions: Stage[Predictions]
    record: Stage[Record]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in their order: several statistics, one or no stage of masks, one of each other."""
        masks = () if self.masks is None else (self.masks,)
        return *self.statistics, *masks, self.tuned, self.predictions, self.record

    def of_kind(self, kind: str) -> list[Stage]:
        """The stages of a kind."""
        return [stage for stage in self.stages if stage.kind == kind]


def chain(config: RunConfig, known: Fingerprints) -> Chain:
    """The stages of a run.

    Args:
        config: the settings of the run.
        known: the fingerprints of what the names in the config stand for.

    Raises:
        ValueError: a name that is not known, a setting or an option that its owner does not have.
        OSError: files that cannot be read.
    """
    masks = None if config.pruning.method == DENSE else masks_stage(config, known)
    tuned = tuned_stage(config, masks, known)
    predictions = predictions_stage(config, tuned, known)
    keys = {stage.kind: stage.key for stage in (masks, tuned, predictions) if stage is not None}
    comparable = unpruned(config)
    if comparable not in known.settings:
        same = config == comparable
        known.settings[comparable] = predictions.key if same else chain(comparable, known).predictions.key
    record = record_stage(config, predictions, known, stages={**keys, "settings": known.settings[comparable]})
    return Chain(masks.inputs if masks else (), masks, tuned, predictions, record)


def unpruned(config: RunConfig) -> RunConfig:
    """This run without pruning, at seed 0; two runs for which it is the same can be compared."""
    return replace(config, seed=0, calibration=CalibrationConfig(), pruning=PruningConfig())


def run(config: RunConfig, execution: Execution | None = None) -> Record:
    """The record of a run, all stages of which are made or taken from the store.

    Args:
        config: everything that changes the numbers.
        execution: how and where the stages are made; None: in memory, without a store.

    Raises:
        ValueError: a setting or data that the run cannot be made with, before anything is.
        OSError: files that cannot be read or written.
    """
    bench = Bench(execution or Execution(store=None))
    skip = bench.execution.skip_broken
    stages = chain(config, Fingerprints(skip_broken=skip))
    check_metrics(config.task, config.task.test, skip_broken=skip)
    [record] = obtain([stages.record], bench)
    if (store := bench.execution.store) is not None:
        settle(stages.tuned.path(store), bench.execution.keep_weights, bench.remote)
    return record


def evaluate(
    model: ModelAdapter,
    task: str,
    data: str,
    split: str = "test",
    options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """{metric: value} of the model as it is, without fine-tuning; known traps of the data are warnings.

    Args:
        model: the model, in evaluation mode.
        task: a key of eval.TASKS.
        data: name of the data, as `load_pairs` and `load_questions` take it.
        split: split to evaluate on.
        options: settings of the task that differ from their defaults, such as {"num_beams": 1}.

    Raises:
        ValueError: an unknown task or option, or a task that the model cannot do.
    """
    config, chosen = TaskConfig(name=task, data=data, test=split), get_task(task)
    check_can(model, config, "the model")
    own: Any = build(chosen.options, options or {}, f"options of {task}")
    test, ready = examples(config, split), prepared(config)
    traps = [seen_in_training(model, config, "the model"), few_answers(config, test)]
    if chosen.prepare is not None:
        traps.append(missed_answers(config, examples(config, config.train)))
    for trap in filter(None, traps):
        logger.warning("%s: %s", data, trap)
    with torch.inference_mode():
        predictions = chosen.predict(model, test, own, ready)
    return chosen.score(predictions, columns(test))
