"""A run function without a model: plausible numbers at once, and failures on request."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlprune.config import PruningConfig, RunConfig, unknown, variant
from vlprune.masks import Masks
from vlprune.reports.variants import label
from vlprune.store.keys import Contents, masks_key
from vlprune.store.masks import save_masks
from vlprune.sweep.table import Catalogue

METRICS = {
    "retrieval": {"tr_r1": 70.0, "tr_r5": 90.0, "ir_r1": 68.0},
    "captioning": {"cider": 400.0, "bleu4": 60.0},
    "vqa": {"accuracy": 82.0},
}
FLOORS = {
    "retrieval": {"chance": {"tr_r1": 0.3, "tr_r5": 1.7, "ir_r1": 0.3}},
    "captioning": {"constant caption": {"cider": 53.0, "bleu4": 9.0}},
    "vqa": {"most frequent answer": {"accuracy": 19.0}},
}
STRENGTH = {"random": 0.3, "omp": 0.9, "lamp": 0.85, "snip": 0.88, "chita++": 0.92, "multiflow": 0.95}
NEEDS = {"snip": frozenset({"grad"}), "multiflow": frozenset({"input_sq"})}


@dataclass(frozen=True)
class Outcome:
    metrics: dict[str, float]
    floors: dict[str, dict[str, float]]
    predictions: list[dict]
    sparsity: float
    layer_sparsity: dict[str, float]
    seconds: dict[str, float]
    peak_memory: int


def run(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    method, sparsity = config.pruning.method, config.pruning.sparsity
    noise = random.Random(
        f"{config.model} {label(method, variant(config))} {sparsity} {config.task.name} {config.seed}"
    )
    kept = 1.0 if method == "dense" else STRENGTH[method] * (1 - sparsity**6) + 0.03 * noise.random()
    return Outcome(
        metrics={metric: kept * value for metric, value in METRICS[config.task.name].items()},
        floors=FLOORS[config.task.name],
        predictions=[{"image_id": 1, "answer": "blå"}],
        sparsity=sparsity,
        layer_sparsity={"layer": sparsity},
        seconds={"finetune": 1.0, "evaluate": 0.5},
        peak_memory=2**30,
    )


def _note(cache_dir: Path, config: RunConfig, needs: frozenset[str]) -> Path:
    # One line an attempt: what ran, in which process.
    notes = cache_dir.parent / "notes"
    notes.mkdir(exist_ok=True)
    name = f"{config.model}_{config.pruning.method}_{config.pruning.sparsity}_{config.task.name}_{config.seed}"
    with (notes / name).open("a") as file:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {devices} {','.join(sorted(needs))}\n")
    return notes / name


def run_noted(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    _note(cache_dir, config, needs)
    return run(config, cache_dir)


def run_masked(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    """Every pruned run leaves a small bundle of masks; random choices share nothing, other methods much."""
    if config.pruning.method != "dense":
        path = cache_dir / "masks" / f"{masks_key(config, contents(config))}.safetensors"
        save_masks(path, masks(config), {"modality": json.dumps({"eye": "vision", "word": "text"})})
    return run(config, cache_dir)


def masks(config: RunConfig) -> Masks:
    method, kept = config.pruning.method, {}
    for layer, shape in (("eye", (30, 40)), ("word", (20, 40))):
        common = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(
            random.Random(f"{layer}{method}{variant(config)}{config.seed}").getrandbits(31)
        )
        scores = torch.rand(shape, generator=common) * (method != "random") + 0.7 * torch.rand(shape, generator=own)
        kept[layer] = scores > scores.flatten().kthvalue(round(config.pruning.sparsity * scores.numel())).values
    return Masks(kept)


def run_unscored(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    """The questions have no answers to compare with."""
    outcome = run(config, cache_dir)
    return replace(outcome, metrics={}, floors={}) if config.task.name == "vqa" else outcome


def run_with_child(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    """A run that starts a process of its own, as loaders do."""
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    assert child.exitcode == 0
    return run(config, cache_dir)


def run_slow(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    """SNIP never ends."""
    _note(cache_dir, config, needs)
    if config.pruning.method == "snip":
        time.sleep(600)
    return run(config, cache_dir)


def run_broken(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    """LAMP raises, SNIP gives NaN, OMP warns."""
    import logging

    if config.pruning.method == "lamp":
        raise RuntimeError("no\nluck")
    if config.pruning.method == "omp":
        logging.getLogger("vlprune.fake").warning("cache damaged")
    outcome = run(config, cache_dir)
    if config.pruning.method == "snip":
        outcome.metrics["tr_r1"] = float("nan")
    return outcome


def run_killed_once(config: RunConfig, cache_dir: Path, needs: frozenset[str] = frozenset()) -> Outcome:
    """OMP's worker dies at the first attempt, LAMP's at every one."""
    attempts = len(_note(cache_dir, config, needs).read_text().splitlines())
    if config.pruning.method == "lamp" or (config.pruning.method == "omp" and attempts == 1):
        os.kill(os.getpid(), 9)
    return run(config, cache_dir)


def contents(config: RunConfig) -> Contents:
    pruned = int(config.pruning.method != "dense")
    data = f"digest of {config.calibration.data}" if pruned else ""
    return Contents(f"digest of {config.model}", 1, data, pruned, pruned, f"digest of {config.task.data}", 1)


def known_contents(config: RunConfig) -> Contents:
    """The contents, if the names of the config are embedded ones or directories."""
    if config.model not in ("tiny-blip", "tiny-xvlm") and not Path(config.model).is_dir():
        raise ValueError(unknown("model", config.model, ("tiny-blip", "tiny-xvlm")))
    for data in (config.task.data, config.calibration.data):
        if data != "scenes" and not Path(data).is_dir():
            raise ValueError(unknown("data set", data, ("scenes",)))
    return contents(config)


def check_pruning(config: PruningConfig) -> None:
    if config.pattern is not None and config.method == "chita++":
        raise ValueError("method 'chita++' takes no pattern")


def check(configs) -> list[str]:
    """Everything can be loaded."""
    return []


def catalogue() -> Catalogue:
    return Catalogue(
        methods={name: NEEDS.get(name, frozenset()) for name in STRENGTH},
        tasks=("retrieval", "captioning", "vqa"),
        headlines={"retrieval": "tr_r1", "captioning": "cider", "vqa": "accuracy"},
        contents=known_contents,
        check=check_pruning,
    )
