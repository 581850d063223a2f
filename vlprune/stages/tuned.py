"""The third stage of a run: the pruned model, fine-tuned for a task under its masks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from datasets import Dataset

from eval import get_task, ranks
from eval.base import Task, compute_together
from vlprune.config import RunConfig, TaskConfig, build, changed
from vlprune.finetune.augment import VERSION as AUGMENT_VERSION
from vlprune.finetune.augment import PaperAugmentation
from vlprune.finetune.checkpoint import Checkpoint
from vlprune.finetune.loop import VERSION as FINETUNE_VERSION
from vlprune.finetune.loop import Tell, finetune, learning_rates
from vlprune.finetune.sampler import Augment, CaptionExamples, Example, not_augmented
from vlprune.finetune.sparse import masked_parameters
from vlprune.finetune.weights import load_sparse, save_sparse
from vlprune.masks import VERSION as MASKS_VERSION
from vlprune.masks import Masks, apply_masks, zeros_of
from vlprune.models import ModelAdapter
from vlprune.precision import computing_in
from vlprune.seeds import VERSION as SEEDS_VERSION
from vlprune.stages.examples import columns, examples, prepared
from vlprune.stages.fingerprints import Fingerprints, prediction_code, score_code, training_code
from vlprune.stages.stage import Bench, Made, Stage
from vlprune.stages.tracking import Trackers
from vlprune.store.artifacts import note_path
from vlprune.store.atomic import write_text
from vlprune.store.doing import say_step
from vlprune.store.record import headline
from vlprune.store.weights import TEMPORARY, tuned_path

logger = logging.getLogger(__name__)

CHECKPOINT = ".checkpoint"
LOSSES = ".losses.csv"


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model in evaluation mode, and the masks it was fine-tuned under (none for the dense model)."""

    model: ModelAdapter
    masks: Masks


def tuned_stage(config: RunConfig, masks: Stage[Masks] | None, known: Fingerprints) -> Stage[Tuned]:
    """The stage that fine-tunes.

    Args:
        config: the settings of the run.
        masks: the stage that pruned; None: the dense model.
        known: the fingerprints.
    """
    task = get_task(config.task.name)

    def make(stages: Sequence[Stage[Tuned]], inputs: Sequence[Masks], bench: Bench) -> list[Made[Tuned]]:
        own = inputs[0] if inputs else Masks({})
        model = bench.taken(config.model)
        if inputs:
            apply_masks(model, own)
        _prepare_for(model, config)
        store = bench.execution.store
        path = None if store is None else stages[0].path(store).with_suffix(CHECKPOINT)
        checkpoint = path and Checkpoint(
            path, bench.execution.checkpoint_seconds, bench.stopping, bench.verify, bench.remote
        )
        with _followed(config, stages[0], bench) as tell:
            _finetune(model, own, config, bench, checkpoint, tell)
        _check_sparse(model, own)
        facts = {TEMPORARY: bench.execution.keep_weights is None, "layers": zeros_of(model)}
        return [Made(Tuned(model, own), facts)]

    def save(made: Made[Tuned], path: Path) -> None:
        save_sparse(path, made.value.model, made.value.masks, made.value.model.layer_of)

    def load(path: Path, bench: Bench) -> Tuned:
        model = bench.taken(config.model)
        _prepare_for(model, config)
        state, own = load_sparse(path)
        model.load_state_dict(state)
        return Tuned(model.eval(), Masks(own))

    return Stage(
        kind="tuned",
        reads=_reads(config, task, known),
        inputs=() if masks is None else (masks,),
        make=make,
        file=tuned_path,
        save=save,
        load=load,
        through_file=False,
        scratch=(CHECKPOINT, note_path(Path(CHECKPOINT)).name),
        beside=(LOSSES,),
        stored=lambda execution: execution.keep_weights != "none",
        joint=True,
    )


def losses_path(path: Path) -> Path:
    """Where the losses of the steps of fine-tuning are, beside its weights, which need not be kept."""
    return path.with_suffix(LOSSES)


@contextmanager
def _followed(config: RunConfig, stage: Stage[Tuned], bench: Bench) -> Iterator[Tell]:
    """Yields what fine-tuning tells its losses, which are said and tracked.

    They are stored in the end, also in that of training that fails.
    """
    losses: Sequence[float] = ()
    rates: list[float] = []
    trackers: Trackers | None = None

    def tell(found: Sequence[float], steps: int) -> None:
        nonlocal losses, rates, trackers
        losses, step = found, len(found)
        if trackers is None:  # before the first step
            rates = learning_rates(config.finetuning, steps)
            trackers = Trackers(config, stage.key, bench, goes_on=step + 1)
        else:
            trackers.step({"training/loss": losses[-1], "training/lr": rates[step - 1]}, step)
        loss = f", loss {losses[-1]:.3f}" if losses else ""
        say_step(f"fine-tuning, step {step} of {steps}{loss}", step, steps)

    try:
        yield tell
    finally:
        if trackers is not None:
            trackers.close()
        if losses and (store := bench.execution.store) is not None and not ranks.rank():
            path = losses_path(stage.path(store))
            rows = [f"{step},{loss:.6g},{rate:.6g}\n" for step, (loss, rate) in enumerate(zip(losses, rates), 1)]
            write_text(path, "step,loss,lr\n" + "".join(rows))
            logger.info("the losses of %d steps are in %s", len(losses), path)


def _prepare_for(model: ModelAdapter, config: RunConfig) -> None:
    """Gives the model the image size and the head of its task, in place; fresh weights are the same every time."""
    _ = model.graph  # that of the pretrained model: a task head may take layers apart that it shares
    if config.task.image_size is not None:
        model.resize_images(config.task.image_size)
    # Fresh weights and dropout do not depend on whether the masks were made in this process.
    set_seed(config.seed)
    model.add_task_head(config.task.name)


def _check_sparse(model: ModelAdapter, masks: Masks) -> None:
    """Whether pruned weights are zero, those of copies of pruned layers too."""
    for name, (parameter, mask) in masked_parameters(model, masks, model.layer_of).items():
        if torch.count_nonzero(parameter.detach()[~mask]):
            raise RuntimeError(f"pruned weights of {name} are not zero after fine-tuning")


def _finetune(
    model: ModelAdapter, masks: Masks, config: RunConfig, bench: Bench, checkpoint: Checkpoint | None, tell: Tell
) -> None:
    """Trains the model in place."""
    task, skip = get_task(config.task.name), bench.execution.skip_broken
    if config.finetuning.steps == 0:
        model.eval()
        return
    train = examples(config.task, config.task.train, skip_broken=skip)
    best = config.finetuning.select == "best"
    val = examples(config.task, "val", skip_broken=skip) if best else None
    ready = prepared(config.task, skip_broken=skip) if best else None

    logger.info("fine-tuning begins")
    finetune(
        model,
        masks,
        model.layer_of,
        _epoch(config, task, train),
        task.loss,
        config.finetuning,
        config.seed,
        augment=_augment(config, model),
        score=None if val is None else partial(_headline, model, task, config, val, ready),
        workers=bench.execution.workers,
        checkpoint=checkpoint,
        tell=tell,
    )


def _headline(model: ModelAdapter, task: Task, config: RunConfig, val: Dataset, ready: Any) -> float:
    options: Any = build(task.options, config.task.options, "task.options")
    with torch.inference_mode(), computing_in(config.task.precision, model.device):
        metrics = task.score(task.predict(model, val, options, ready, compute_together), columns(val))
    return metrics[headline(task.headline, metrics)]


def _epoch(config: RunConfig, task: Task, train: Dataset) -> Sequence[Example]:
    """The examples of an epoch; where epochs are counted, an image comes with each of its captions by itself."""
    single = task.examples == "pairs" and config.finetuning.epochs is not None
    return cast(Sequence[Example], CaptionExamples(train) if single else train)


def _augment(config: RunConfig, model: ModelAdapter) -> Augment:
    return not_augmented if config.finetuning.augment == "none" else PaperAugmentation(model.image.size, config.seed)


def _reads(config: RunConfig, task: Task, known: Fingerprints) -> dict[str, Any]:
    """What the fine-tuned weights depend on besides the masks."""
    reads: dict[str, Any] = {"model": known.model(config.model), "seed": config.seed, "task": task.name}
    if config.task.image_size is not None:
        reads["image_size"] = config.task.image_size
    reads["code"] = [FINETUNE_VERSION, MASKS_VERSION, SEEDS_VERSION]
    if config.finetuning.steps == 0:
        return {**reads, "finetuning": {"steps": 0}}
    reads |= {
        "train": known.split(config.task, task.examples, config.task.train),
        "loss": training_code(task),
        "finetuning": changed(config.finetuning),
    }
    if config.finetuning.augment != "none":
        reads["augment"] = AUGMENT_VERSION
    if config.finetuning.select == "best":
        reads["val"] = known.split(config.task, task.examples, "val")
        options: Any = build(task.options, config.task.options, "task.options")
        reads["selection"] = [prediction_code(task), score_code(task), task.headline, changed(options)]
        if config.task.precision != TaskConfig().precision:
            reads["precision"] = config.task.precision
    return reads
