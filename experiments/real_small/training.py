"""A stage of training that goes on where it was interrupted."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from vlprune.store.atomic import atomic

MINUTES = 3  # between checkpoints


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of the parts of a model; 0 freezes a part.

    Attributes:
        vision: learning rate of the vision encoder's last layer.
        decay: factor from the learning rate of one vision layer to that of the layer below.
        text: learning rate of the text layers.
        words: learning rate of the embeddings of words.
        fusion: learning rate of the fusion layers.
        projections: learning rate of the projections that make features for ITC.
        heads: learning rate of cross-attention and heads.
    """

    vision: float = 0.0
    decay: float = 0.8
    text: float = 0.0
    words: float = 0.0
    fusion: float = 0.0
    projections: float = 0.0
    heads: float = 0.0

    def of(self, model: Any, name: str) -> float:
        """The peak learning rate of a parameter."""
        number = re.search(r"\.layers?\.(\d+)\.", name)
        if name.startswith("vision_model"):
            depth = model.vision_model.config.num_hidden_layers
            above = depth - 1 - int(number[1]) if number else depth * ("norm" not in name)
            return self.vision * self.decay**above
        if name == "temp":
            return self.projections / 10
        if name.startswith(("vision_proj", "text_proj")):
            return self.projections
        if name.startswith("text_encoder.embeddings"):
            return self.words
        if number and int(number[1]) < model.fusion_layer:
            return self.text
        if number and "crossattention" not in name:
            return self.fusion
        return self.heads


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one objective.

    Attributes:
        name: name of the stage in the log.
        epochs: number of epochs.
        rates: peak learning rates; they rise for a tenth of the steps, then fall as a cosine to zero.
        epoch: (generator) -> the batches of an epoch, each a list of photos' numbers.
        losses: (photos' numbers, generator) -> {name: scalar}, whose sum is minimised.
        judge: () -> {metric: value} on the photos of the split val; the weights of the highest "score" are kept.
    """

    name: str
    epochs: int
    rates: Rates
    epoch: Callable[[Generator], list[list[int]]]
    losses: Callable[[list[int], Generator], dict[str, Tensor]]
    judge: Callable[[], dict[str, float]]


class Log:
    """Prints rows and appends them to a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, **row: Any) -> None:
        line = json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def load_finished(model: nn.Module, out: Path, name: str) -> bool:
    """Whether a stage is finished; if so, the model has its weights, in place."""
    path = out / f"{name}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
    return path.is_file()


def train(model: Any, stage: Stage, *, seed: int, averaging: float, out: Path, log: Log) -> None:
    """Trains a model in place; it ends with the averaged weights of the epoch that was best on val.

    Every random choice of a step follows from the seed and the step's number, so that an interrupted stage ends where
    an uninterrupted one does.

    Args:
        model: to train.
        stage: what to minimise.
        seed: seed of all random choices.
        averaging: share of the past in the moving average of the weights, at each step.
        out: directory of the checkpoint, and of the best weights of each finished stage.
        log: gets a row for each epoch.
    """
    checkpoint = out / "checkpoint.pt"
    parameters = {}
    groups = []
    for name, parameter in model.named_parameters():
        peak = stage.rates.of(model, name)
        parameter.requires_grad_(peak > 0)
        if peak:
            parameters[name] = parameter
            groups.append({"params": [parameter], "peak": peak, "weight_decay": 0.05 if parameter.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    best: dict[str, Tensor] = {}
    step, highest, seconds = 0, -math.inf, 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["stage"] == stage.name:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            average, best = saved["average"], saved["best"]
            step, highest, seconds = saved["step"], saved["highest"], saved["seconds"]
    per_epoch = len(stage.epoch(torch.Generator().manual_seed(seed)))
    total = per_epoch * stage.epochs
    started = last = time.monotonic()
    sums: dict[str, float] = {}

    while step < total:
        generator = torch.Generator().manual_seed(seed + 1000 * (step // per_epoch))
        chosen = stage.epoch(generator)[step % per_epoch]
        choices = torch.Generator().manual_seed(seed + 1000 * step + 1)
        torch.manual_seed(seed + 1000 * step + 2)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, 10 * (step + 1) / total) * (1 + math.cos(math.pi * step / total)) / 2
        model.train()
        losses = stage.losses(chosen, choices)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for name, parameter in parameters.items():
                average[name].lerp_(parameter, 1 - min(averaging, step / (step + 10)))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        if step % per_epoch == 0 or step == total:
            own = _swap(parameters, average)
            model.eval()
            metrics = stage.judge()
            spent = seconds + time.monotonic() - started
            means = {name: value / per_epoch for name, value in sums.items()}
            log(stage=stage.name, epoch=step // per_epoch, seconds=round(spent), **means, **metrics)
            if metrics["score"] > highest:
                highest, best = metrics["score"], {name: p.detach().clone() for name, p in parameters.items()}
            _swap(parameters, own)
            sums = {}
        if time.monotonic() - last > 60 * MINUTES:
            last = time.monotonic()
            with atomic(checkpoint) as part:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
                numbers = {"step": step, "highest": highest, "seconds": seconds + last - started}
                torch.save({"stage": stage.name, "best": best, **state, **numbers}, part)
    _swap(parameters, best)
    model.eval()
    with atomic(out / f"{stage.name}.pt") as part:
        torch.save(model.state_dict(), part)


@torch.no_grad()
def _swap(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives parameters other values, in place, and returns those they had."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
    return before
