"""Fine-tuning under the mask: pruned entries are zero after every step."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_scheduler

from vlprune.config import FinetuningConfig
from vlprune.finetune.sampler import Change, Drawn, Example, Passes, unchanged

Loss = Callable[[nn.Module, Sequence[Mapping[str, Any]], Generator], Tensor]


def finetune(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layer_of: Callable[[str], str],
    examples: Sequence[Example],
    loss: Loss,
    config: FinetuningConfig,
    seed: int,
    *,
    change: Change = unchanged,
    score: Callable[[], float] | None = None,
    workers: int = 0,
) -> list[float]:
    """Losses of the steps; trains the model in place.

    Args:
        model: in eval or train mode, left in eval mode; its pruned entries are zero already.
        masks: {layer name: bool (out, in)}, True = trained.
        layer_of: parameter name -> layer name, so that copies of a pruned layer stay pruned too.
        examples: drawn without replacement, epoch after epoch.
        loss: (model, examples, generator) -> scalar, a mean over the examples.
        config: of the optimizer, the steps and their batches.
        seed: of the order and of what the loss draws.
        change: what is done to an example when it is drawn.
        score: how good the model is, in eval mode, after each epoch; the weights that it is highest with are kept, of
            equally good ones the first. None keeps the last.
        workers: processes that read and change examples; any number gives the same training.

    Raises:
        RuntimeError: a loss that is not finite.
        ValueError: no examples.
    """
    if config.steps == 0:
        return []
    if not len(examples):
        raise ValueError("fine-tuning needs training examples, and there are none")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        # A task leaves some modules out, such as BLIP's encoder in captioning.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    draws = torch.Generator().manual_seed(seed + 1)
    n, epochs = len(examples), config.epochs
    epoch = max(1, n // config.batch_size) if epochs is None else math.ceil(n / config.batch_size)
    steps = config.steps if epochs is None else epochs * epoch
    assert steps is not None  # FinetuningConfig has one of both
    passes = Passes(
        n,
        batch_size=config.batch_size,
        device_batch=config.device_batch,
        steps=epoch,
        generator=torch.Generator().manual_seed(seed),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    optimizer = _optimizer(model, config)
    schedule = get_scheduler(config.schedule, optimizer, math.ceil(config.warmup * steps), steps)
    # The scheduler is stepped by hand, once an optimizer step, whatever the number of processes.
    prepared, prepared_optimizer = accelerator.prepare(_Loss(model, loss, config.precision), optimizer)
    history, best, kept = [], -math.inf, None
    batches = _endless(_loader(Drawn(examples, change), passes, workers))
    model.train()
    with kept_sparse(model, optimizer, masks, layer_of):
        for step in range(steps):
            prepared_optimizer.zero_grad(set_to_none=True)
            history.append(0.0)
            for left in reversed(range(passes.per_step)):
                batch = next(batches)
                with accelerator.no_sync(prepared) if left else nullcontext():
                    # Averaged over the examples of the step; gradients are averaged over processes.
                    value = prepared(batch, draws) * (len(batch) * accelerator.num_processes / passes.size)
                    accelerator.backward(value)
                history[-1] += value.item()
            if not math.isfinite(history[-1]):
                raise RuntimeError(
                    f"the loss is {history[-1]} at fine-tuning step {step}; a smaller lr than {config.lr}?"
                )
            if config.clip:
                accelerator.clip_grad_norm_(prepared.parameters(), config.clip)
            prepared_optimizer.step()
            schedule.step()
            if score is not None and (step + 1) % epoch == 0:
                model.eval()
                found = score()
                if found > best:
                    best, kept = found, _copied(model)
                model.train()
    if kept is not None:
        model.load_state_dict(kept)
    model.eval()
    return history


@contextmanager
def kept_sparse(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor], layer_of: Callable[[str], str]
) -> Iterator[None]:
    """While inside, gradients of pruned entries are zero, and so are the entries after every optimizer step.

    The gradient alone would not do: old momentum and weight decay move an entry without one. The step alone would not
    either: the gradients of dead entries would count in the clipped norm.
    """
    masked = [
        (parameter, masks[layer_of(name)].to(parameter.device))
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and layer_of(name) in masks
    ]

    def zero_pruned(*_: object) -> None:
        with torch.no_grad():
            for parameter, mask in masked:
                parameter.mul_(mask)

    handles = []
    try:
        for parameter, mask in masked:
            handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
        handles.append(optimizer.register_step_post_hook(zero_pruned))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _loader(drawn: Drawn, passes: Passes, workers: int) -> DataLoader:
    if workers:  # new ones in every epoch, which then need not import all that again
        multiprocessing.set_forkserver_preload(["vlprune.finetune.augment", "vlprune.finetune.sampler"])
    return DataLoader(
        drawn,  # pyright: ignore[reportArgumentType]
        batch_sampler=passes,
        generator=passes.generator,
        collate_fn=list,
        num_workers=workers,
        # A run has threads, and a fork of it would copy their locks.
        multiprocessing_context="forkserver" if workers else None,
    )


def _endless(loader: DataLoader) -> Iterator[list[Any]]:
    while True:
        yield from loader
