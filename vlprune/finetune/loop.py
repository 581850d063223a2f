"""Fine-tuning under the mask: pruned weights are zero after every step."""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_scheduler

from eval import ranks
from vlprune.config import FinetuningConfig
from vlprune.finetune.checkpoint import Checkpoint
from vlprune.finetune.sampler import Augment, AugmentedExamples, Epochs, Example, PassSampler, not_augmented
from vlprune.finetune.sparse import KeptSparse
from vlprune.seeds import seed_of

logger = logging.getLogger(__name__)

# Raised when the weights that come out, or what is noted of them, change, so that runs are made again.
VERSION = 3
FUSED = frozenset({"cpu", "cuda"})  # types of devices on which AdamW is one kernel
Loss = Callable[[nn.Module, Sequence[Mapping[str, Any]], Generator], Tensor]
# (the loss of every step so far, the number of all steps) -> None.
Tell = Callable[[Sequence[float], int], None]


def finetune(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layer_of: Callable[[str], str],
    examples: Sequence[Example],
    loss: Loss,
    config: FinetuningConfig,
    seed: int,
    *,
    augment: Augment = not_augmented,
    score: Callable[[], float] | None = None,
    workers: int = 0,
    checkpoint: Checkpoint | None = None,
    tell: Tell = lambda *_: None,
) -> list[float]:
    """The loss of every step; trains the model in place.

    Where several ranks train together (`eval.ranks`), each calls this with the same arguments and has a share of every
    forward pass; but for dropout, of which each rank has its own, the losses and weights are those of one process.

    Args:
        model: in eval or train mode, left in eval mode; its pruned weights are zero already.
        masks: {layer name: bool (out, in)}, True = trained.
        layer_of: parameter name -> name of the layer whose mask it has, so that copies of a pruned layer stay pruned.
        examples: the training examples; each epoch sees them once, in an order of its own.
        loss: (model, examples, generator) -> scalar, a mean over the examples.
        config: the settings of the optimizer, of the steps and of their batches.
        seed: seeds the order of the examples and the random choices of the loss.
        augment: what is done to an example before it is trained on.
        score: returns how good the model is, in eval mode; asked after each epoch, and the weights with the highest
            score are kept, of equally good ones the first. None keeps the last weights.
        workers: loader processes that read and augment examples; any number gives the same training.
        checkpoint: where the state of training is stored now and then; training goes on from one that is there.
        tell: called before the first step, and in every one as soon as its loss is known.

    Raises:
        RuntimeError: a loss that is not finite.
        ValueError: no examples.
        Interrupted: the process was asked to stop; the checkpoint holds where training was.
    """
    if config.steps == 0:
        return []
    if not len(examples):
        raise ValueError("fine-tuning needs training examples, and there are none")
    accelerator = Accelerator(
        cpu=next(model.parameters()).device.type == "cpu",
        # A task leaves some modules out, such as BLIP's encoder in captioning.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    choices = torch.Generator().manual_seed(seed_of(seed, "loss"))
    n, epochs = len(examples), config.epochs
    epoch = max(1, n // config.batch_size) if epochs is None else math.ceil(n / config.batch_size)
    steps = config.steps if epochs is None else epochs * epoch
    assert steps is not None  # FinetuningConfig has one of both
    sampler = PassSampler(
        n,
        batch_size=config.batch_size,
        device_batch=config.device_batch,
        steps=epoch,
        generator=torch.Generator().manual_seed(seed_of(seed, "order of examples")),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    optimizer = _optimizer(model, config)
    schedule = get_scheduler(config.schedule, optimizer, math.ceil(config.warmup * steps), steps)
    # The scheduler is stepped by hand, once an optimizer step, whatever the number of processes.
    prepared, prepared_optimizer = accelerator.prepare(_Loss(model, loss, config.precision), optimizer)
    batches = Epochs(_loader(AugmentedExamples(examples, augment), sampler, workers), sampler)
    history, best, kept = [], -math.inf, None
    if checkpoint is not None and (state := checkpoint.read()) is not None:
        history, best, kept = state["history"], state["best"], state["kept"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule"), (batches, "batches")):
            part.load_state_dict(state[name])
        _set_random_state(state["random"], choices)
        logger.info("fine-tuning goes on from step %d of %d", len(history), steps)
    if len(set(begins := ranks.listed([len(history)]))) > 1:
        raise RuntimeError(f"the processes read checkpoints of different steps, {begins}; do they share a disk?")

    def snapshot() -> dict[str, Any]:
        """All that the rest of the training depends on."""
        return {
            "history": history,
            "best": best,
            "kept": kept,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "batches": batches.state_dict(),
            "random": _random_state(choices),
        }

    model.train()
    sparse = KeptSparse(model, masks, layer_of)
    tell(history, steps)
    for step in range(len(history), steps):
        prepared_optimizer.zero_grad(set_to_none=True)
        total = 0.0
        if ranks.rank():  # dropout of its own, which the first rank's checkpoint need not hold
            torch.manual_seed(seed_of(seed, "rank", step, ranks.rank()))
        for left in reversed(range(sampler.per_step)):
            batch = next(batches)
            with accelerator.no_sync(prepared) if left else nullcontext():
                # Averaged over the examples of the step; gradients are averaged over processes.
                value = prepared(batch, choices) * (len(batch) * accelerator.num_processes / sampler.size)
                accelerator.backward(value)
            total += value.item()
        history.append(sum(ranks.listed([total])) / ranks.world())
        tell(history, steps)
        if not math.isfinite(history[-1]):
            raise RuntimeError(f"the loss is {history[-1]} at fine-tuning step {step}; a smaller lr than {config.lr}?")
        sparse.mask_gradients()
        if config.clip:
            accelerator.clip_grad_norm_(prepared.parameters(), config.clip)
        prepared_optimizer.step()
        sparse.mask_weights()
        schedule.step()
        if score is not None and (step + 1) % epoch == 0:
            model.eval()
            found = ranks.told(score())
            if found > best:
                best, kept = found, _copied(model)
            model.train()
        if checkpoint is not None:
            checkpoint.after_step(snapshot)
    if kept is not None:
        model.load_state_dict(kept)
    model.eval()
    return history


def learning_rates(config: FinetuningConfig, steps: int) -> list[float]:
    """The learning rate of every optimizer step.

    Args:
        config: the settings of the schedule.
        steps: number of steps.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.lr)
    schedule = get_scheduler(config.schedule, optimizer, math.ceil(config.warmup * steps), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


class _Loss(nn.Module):
    """A model and a loss as one module, so that data-parallel wrappers see the forward pass."""

    def __init__(self, model: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.precision = precision

    def forward(self, examples: Sequence[Mapping[str, Any]], generator: Generator) -> Tensor:
        """The loss of a list of examples."""
        device = next(self.model.parameters()).device.type
        # Not accelerate's: its precision cannot change within a process, and runs share one.
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.loss(self.model, examples, generator)


def _optimizer(model: nn.Module, config: FinetuningConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decayed == "all" or p.ndim > 1]
    plain = [p for p in trained if config.decayed != "all" and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # One pass over the memory instead of one for each operation; torch has it for these devices.
    fused = all(parameter.device.type in FUSED for parameter in trained)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _loader(examples: AugmentedExamples, sampler: PassSampler, workers: int) -> DataLoader:
    if workers:  # several runs after another, which then need not import all that again
        multiprocessing.set_forkserver_preload(["vlprune.finetune.augment", "vlprune.finetune.sampler"])
    return DataLoader(
        examples,  # pyright: ignore[reportArgumentType]
        batch_sampler=sampler,
        generator=torch.Generator(),  # of seeds for workers, which draw nothing
        collate_fn=list,
        num_workers=workers,
        persistent_workers=workers > 0,
        # A run has threads, and a fork of it would copy their locks.
        multiprocessing_context="forkserver" if workers else None,
    )


def _random_state(choices: Generator) -> dict[str, Any]:
    """The state of the loss's generator and of those that dropout draws from."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return {"choices": choices.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any], choices: Generator) -> None:
    choices.set_state(state["choices"])
    torch.set_rng_state(state["cpu"])
    for cuda in state["cuda"]:
        torch.cuda.set_rng_state(cuda)
