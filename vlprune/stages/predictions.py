"""The fourth stage of a run: what the fine-tuned model says to every test sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval import get_task
from vlprune.config import RunConfig, TaskConfig, build, changed
from vlprune.execution import Interrupted
from vlprune.precision import computing_in
from vlprune.stages.examples import examples, prepared
from vlprune.stages.fingerprints import Fingerprints, prediction_code
from vlprune.stages.stage import Bench, Made, Stage
from vlprune.stages.tuned import Tuned
from vlprune.store.lease import say
from vlprune.store.parts import Parts

PARTS = ".parts"
Predictions = list[dict[str, Any]]


def predictions_stage(config: RunConfig, tuned: Stage[Tuned], known: Fingerprints) -> Stage[Predictions]:
    """The stage that predicts, in parts that are stored one by one.

    Args:
        config: the settings of the run.
        tuned: the stage that fine-tuned.
        known: the fingerprints.

    Raises:
        ConfigError: options that the task does not have.
    """
    task = get_task(config.task.name)
    options: Any = build(task.options, config.task.options, "task.options")

    def make(stages: Sequence[Stage[Predictions]], inputs: Sequence[Tuned], bench: Bench) -> list[Made[Predictions]]:
        [fine_tuned], [stage] = inputs, stages
        skip, store = bench.execution.skip_broken, bench.execution.store
        test, ready = examples(config.task, config.task.test, skip_broken=skip), prepared(config.task, skip_broken=skip)
        parts = None if store is None else Parts(stage.path(store).with_suffix(PARTS))

        def keep(number: int, part: Callable[[], list[Any]]) -> list[Any]:
            if parts is None:
                return part()

            def verified() -> list[Any]:
                values = part()
                bench.verify()
                return values

            known = number in parts
            say(f"evaluation, part {number + 1}")
            values = parts.keep(number, verified)
            if not known and bench.stopping():  # after a new part, so that every attempt gets on
                raise Interrupted("evaluation stopped; it goes on from the parts that are stored")
            return values

        with torch.inference_mode(), computing_in(config.task.precision, bench.device):
            predictions = task.predict(fine_tuned.model, test, options, ready, keep)
        facts = bench.note(stage.inputs[0]).facts
        return [Made(predictions, {name: facts[name] for name in ("sparsity", "layer_sparsity")})]

    reads: dict[str, Any] = {
        "test": known.split(config.task, task.examples, config.task.test),
        "code": prediction_code(task),
    }
    if given := changed(options):
        reads["options"] = given
    if config.task.precision != TaskConfig().precision:
        reads["precision"] = config.task.precision
    if task.prepare is not None:
        reads["prepared"] = known.prepared(config.task, task)
    return Stage(
        kind="predictions",
        reads=reads,
        inputs=(tuned,),
        scratch=(PARTS,),
        make=make,
        file=lambda results, key: results / "predictions" / f"{key}.jsonl",
        save=lambda made, path: _save(made.value, path),
        load=lambda path, _bench: _load(path),
    )


def _save(predictions: Predictions, path: Path) -> None:
    lines = [json.dumps(prediction, allow_nan=False, ensure_ascii=False) + "\n" for prediction in predictions]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _load(path: Path) -> Predictions:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
