"""The fourth stage of a run: what the fine-tuned model says to every test sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval import get_task, ranks
from eval.base import Part
from vlprune.config import RunConfig, TaskConfig, build, changed
from vlprune.data.ahead import read_ahead
from vlprune.execution import Interrupted
from vlprune.precision import computing_in
from vlprune.stages.examples import examples, prepared
from vlprune.stages.fingerprints import Fingerprints, prediction_code
from vlprune.stages.stage import Bench, Made, Stage
from vlprune.stages.tuned import Tuned
from vlprune.store.doing import say, say_step
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
        # Of several ranks the first alone reads and stores parts.
        stored = None if store is None or ranks.rank() else Parts(stage.path(store).with_suffix(PARTS))

        def keep(first: int, parts: Sequence[Part]) -> list[list[Any]]:
            makes = dict(enumerate(parts, first))
            found = ranks.told(
                {} if stored is None else {number: stored[number] for number in makes if number in stored}
            )
            missing = [number for number in makes if number not in found]
            # A task may have further parts after a single one, and parts of one call alone take alike long.
            of = f" of {first + len(parts)}" if len(parts) > 1 else ""
            say("evaluation")
            made = ranks.in_turns([makes[number] for number in missing])
            for done, number in enumerate(missing):
                say_step(f"evaluation, part {number + 1}{of}", done, len(missing))
                values = next(made)
                found[number] = values
                if stored is not None:
                    bench.verify()
                    stored.add(number, values)
                    found[number] = stored[number]
                if any(ranks.listed([bench.stopping()])):  # after a new part, so that every attempt gets on
                    raise Interrupted("evaluation stopped; it goes on from the parts that are stored")
            return [found[number] for number in makes]

        with (
            torch.inference_mode(),
            computing_in(config.task.precision, bench.device),
            read_ahead(test, bench.execution.workers) as rows,
        ):
            predictions = task.predict(fine_tuned.model, rows, options, ready, keep)
        return [Made(predictions, {"layers": bench.note(stage.inputs[0]).facts["layers"]})]

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
        joint=True,
    )


def _save(predictions: Predictions, path: Path) -> None:
    lines = [json.dumps(prediction, allow_nan=False, ensure_ascii=False) + "\n" for prediction in predictions]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _load(path: Path) -> Predictions:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
