"""The last stage of a run: its predictions scored, with what it cost."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from eval import get_task
from vlprune.config import RunConfig
from vlprune.reports.variants import setting
from vlprune.stages.examples import columns, examples, extra_metrics, floors
from vlprune.stages.fingerprints import Fingerprints, score_code
from vlprune.stages.predictions import Predictions
from vlprune.stages.stage import Bench, Made, Stage
from vlprune.stages.tracking import Trackers
from vlprune.stages.tuned import losses_path
from vlprune.store.artifacts import note_path
from vlprune.store.atomic import write_text
from vlprune.store.origin import now, origin
from vlprune.store.per_image import SUFFIX, write_per_image
from vlprune.store.record import LOSSES, RECORD, Record, read_record, record_text, run_directory


def record_stage(
    config: RunConfig, predictions: Stage[Predictions], known: Fingerprints, *, stages: Mapping[str, str]
) -> Stage[Record]:
    """The stage that scores.

    Args:
        config: the settings of the run.
        predictions: the stage that predicted.
        known: the fingerprints.
        stages: {kind: key} of the run's other stages, which the record names.
    """
    task, extra = get_task(config.task.name), extra_metrics(config.task)

    def make(stages_: Sequence[Stage[Record]], inputs: Sequence[Predictions], bench: Bench) -> list[Made[Record]]:
        [stage], [said] = stages_, inputs
        began, started, skip = time.perf_counter(), now(), bench.execution.skip_broken
        test = columns(examples(config.task, config.task.test, skip_broken=skip))
        scored = any(example[task.references] for example in test)
        note = bench.note(predictions)
        layers = note.facts["layers"]
        modalities = dict.fromkeys(own["modality"] for own in layers.values())
        by_modality = {name: [own for own in layers.values() if own["modality"] == name] for name in modalities}
        record = Record(
            key=stage.key,
            config=config,
            metrics=task.score(said, test, **({"extra": extra} if extra else {})) if scored else {},
            floors=floors(config.task, skip_broken=skip) if scored else {},
            sparsity=_sparsity(layers.values()),
            modality_sparsity={modality: _sparsity(own) for modality, own in by_modality.items()},
            layers=layers,
            seconds={
                **{kind: seconds for kind, (seconds, _) in note.costs.items()},
                "record": round(time.perf_counter() - began, 3),
            },
            peak_memory=int(max(memory for _, memory in note.costs.values())),
            left_out={
                split: len(missing)
                for split in (config.task.train, config.task.test)
                if (missing := known.left_out(config.task, task.examples, split))
            },
            origins={**note.origins, "record": origin(started, bench.device_name)},
            stages=dict(stages),
            evaluated={"images": len({example["image_id"] for example in test}), "samples": len(test)},
        )
        if scored and task.per_image is not None and bench.execution.store is not None:
            write_per_image(bench.execution.store, stage.key, task.per_image(said, test))
        [tuned] = predictions.inputs
        if (store := bench.execution.store) is not None:
            losses = losses_path(tuned.path(store))
            if not losses.is_file():
                bench.remote.fetch_file(losses)
            steps = _copy_losses(losses, run_directory(store, stage.key))
            with closing(Trackers(config, tuned.key, bench, goes_on=None)) as trackers:
                test = " ".join(["test", *(setting(*option) for option in config.task.options.items())])
                trackers.metrics({f"{test}/{name}": value for name, value in record.metrics.items()}, steps)
        return [Made(record)]

    reads: dict[str, Any] = {
        "code": score_code(task),
        "train": known.split(config.task, task.examples, config.task.train),  # of the floors
        **({"extra": extra} if extra else {}),
    }
    return Stage(
        kind="record",
        reads=reads,
        inputs=(predictions,),
        beside=(SUFFIX, note_path(Path(SUFFIX)).name),
        make=make,
        file=lambda results, key: run_directory(results, key) / RECORD,
        save=_save,
        load=_load,
    )


def _sparsity(layers: Collection[Mapping[str, Any]]) -> float:
    """The fraction of the weights of layers that are zero."""
    weights = sum(layer["weights"] for layer in layers)
    return 1 - (weights - sum(layer["zeros"] for layer in layers)) / weights


def _copy_losses(losses: Path, directory: Path) -> int:
    """The number of steps of fine-tuning, whose losses are copied to the directory of a run; none where it has none."""
    if not losses.is_file():
        return 0
    text = losses.read_text(encoding="utf-8")
    write_text(directory / LOSSES, text)
    return text.count("\n") - 1


def _save(made: Made[Record], path: Path) -> None:
    path.write_text(record_text(made.value), encoding="utf-8")


def _load(path: Path, _bench: Bench) -> Record:
    record = read_record(path.parent)
    if record is None:
        raise ValueError(f"{path} is no record")
    return record
