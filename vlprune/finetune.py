"""Fine-tuning under the mask: pruned entries are zero after every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from datasets import Dataset
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_scheduler

from vlprune.config import FinetuningConfig

Loss = Callable[[nn.Module, Sequence[Mapping[str, Any]], Generator], Tensor]


def finetune(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layer_of: Callable[[str], str],
    examples: Dataset,
    loss: Loss,
    config: FinetuningConfig,
    seed: int,
) -> list[float]:
    """Losses of the steps; trains the model in place.

    Args:
        model: in eval or train mode, left in eval mode; its pruned entries are zero already.
        masks: {layer name: bool (out, in)}, True = trained.
        layer_of: parameter name -> layer name, so that copies of a pruned layer stay pruned too.
        examples: drawn without replacement, epoch after epoch.
        loss: (model, examples, generator) -> scalar.
        config: of the optimizer.
        seed: of the order and of what the loss draws.

    Raises:
        RuntimeError: a loss that is not finite.
    """
    if config.steps == 0:
        return []
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator().manual_seed(seed + 1)
    loader = DataLoader(
        examples,  # pyright: ignore[reportArgumentType]
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=len(examples) >= config.batch_size,
        generator=order,
        collate_fn=list,
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        # A task leaves some modules out, such as BLIP's encoder in captioning.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    optimizer = _optimizer(model, config)
    schedule = get_scheduler(config.schedule, optimizer, math.ceil(config.warmup * config.steps), config.steps)
    model.train()
    # The scheduler is stepped by hand, once an optimizer step, whatever the number of processes.
    prepared, prepared_optimizer, prepared_loader = accelerator.prepare(_Loss(model, loss), optimizer, loader)
    history = []
    with kept_sparse(model, optimizer, masks, layer_of):
        for step, batch in zip(range(config.steps), _endless(prepared_loader)):
            value = prepared(batch, draws)
            history.append(value.item())
            if not math.isfinite(history[-1]):
                raise RuntimeError(
                    f"the loss is {history[-1]} at fine-tuning step {step}; a smaller lr than {config.lr}?"
                )
            prepared_optimizer.zero_grad(set_to_none=True)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(prepared.parameters(), config.clip)
            prepared_optimizer.step()
            schedule.step()
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

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, examples: Sequence[Mapping[str, Any]], generator: Generator) -> Tensor:
        """The loss of a list of examples."""
        return self.loss(self.model, examples, generator)


def _optimizer(model: nn.Module, config: FinetuningConfig) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def _endless(loader: DataLoader) -> Iterator[list[Any]]:
    while True:
        yield from loader
