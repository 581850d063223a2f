"""Work without a model: plausible numbers at once, and failures on request."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from vlprune.config import RunConfig
from vlprune.execution import Execution
from vlprune.reports.variants import label, variant
from vlprune.store.artifacts import Note, written
from vlprune.store.atomic import write_text
from vlprune.store.keys import digest
from vlprune.store.record import RECORD, Record, predictions_path, record_text, run_directory
from vlprune.sweep.job import Job

if TYPE_CHECKING:
    from vlprune.masks import Masks

RECALLS = [f"{way}_{level}" for way in ("tr", "ir") for level in ("r1", "r5", "r10", "mean")]
METRICS = {
    "retrieval": (*RECALLS, "r_mean"),
    "captioning": ("bleu4", "rougel", "cider"),
    "vqa": ("accuracy",),
}
VALUES = {"retrieval": 70.0, "captioning": 400.0, "vqa": 82.0}
FLOORS = {"retrieval": "chance", "captioning": "constant caption", "vqa": "most frequent answer"}
STRENGTH = {"random": 0.3, "omp": 0.9, "lamp": 0.85, "snip": 0.88, "chita++": 0.92, "multiflow": 0.95}
ORIGIN = {
    "started": "2026-11-27T21:30:05+00:00",
    "finished": "2026-11-27T21:30:06+00:00",
    "host": "vm",
    "device": "a processor",
    "commit": "",
    "versions": {"torch": "2"},
}

Stopping = Callable[[], bool]


def record(job: Job) -> Record:
    [config], [key] = job.configs, job.keys
    method, sparsity = config.pruning.method, config.pruning.sparsity
    noise = random.Random(
        f"{config.model.name} {label(method, variant(config))} {sparsity} {config.task.name} {config.seed}"
    )
    kept = 1.0 if method == "dense" else STRENGTH[method] * (1 - sparsity**6) + 0.03 * noise.random()
    metrics, value = METRICS[config.task.name], VALUES[config.task.name]
    dense = replace(config, seed=0, pruning=RunConfig().pruning, calibration=RunConfig().calibration)
    return Record(
        key=key,
        config=config,
        metrics=dict.fromkeys(metrics, kept * value),
        floors={FLOORS[config.task.name]: dict.fromkeys(metrics, 0.1 * value)},
        sparsity=sparsity,
        modality_sparsity={"vision": sparsity},
        layers={"layer": {"modality": "vision", "weights": 400, "zeros": round(400 * sparsity)}},
        seconds={"tuned": 1.0, "predictions": 0.5},
        peak_memory=2**30,
        left_out={},
        origins={"record": dict(ORIGIN)},
        stages={"masks": masks_key(config), "tuned": key, "predictions": key, "settings": digest(dense)},
    )


def write(own: Record, execution: Execution) -> None:
    assert execution.store is not None
    with written(run_directory(execution.store, own.key) / RECORD, Note()) as half:
        half.write_text(record_text(own), encoding="utf-8")


def work(job: Job, execution: Execution, stopping: Stopping) -> None:
    if job.is_run:
        write(record(job), execution)


def _note(job: Job, execution: Execution) -> Path:
    # One line an attempt: what ran, in which process.
    assert execution.store is not None
    notes = execution.store / "notes"
    notes.mkdir(parents=True, exist_ok=True)
    name = str(job).replace(" ", "_").replace(",", "")
    with (notes / name).open("a") as file:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {devices} {job.kind}\n")
    return notes / name


def work_noted(job: Job, execution: Execution, stopping: Stopping) -> None:
    _note(job, execution)
    work(job, execution, stopping)


def masks_key(config: RunConfig) -> str:
    return digest(config.model, config.seed, config.calibration, config.pruning)


def work_masked(job: Job, execution: Execution, stopping: Stopping) -> None:
    """Every pruned run leaves a small bundle of masks; random choices share nothing, other methods much."""
    [config] = job.configs if job.is_run else [None]
    if config is not None and config.pruning.method != "dense":
        assert execution.store is not None
        from vlprune.store.masks import save_masks

        path = execution.store / "cache" / "masks" / f"{masks_key(config)}.safetensors"
        save_masks(path, masks(config), {"modality": json.dumps({"eye": "vision", "word": "text"})})
    work(job, execution, stopping)


def masks(config: RunConfig) -> Masks:
    import torch  # takes seconds, and few workers need it

    from vlprune.masks import Masks

    method, kept = config.pruning.method, {}
    for layer, shape in (("eye", (30, 40)), ("word", (20, 40))):
        common = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(
            random.Random(f"{layer}{method}{variant(config)}{config.seed}").getrandbits(31)
        )
        scores = torch.rand(shape, generator=common) * (method != "random") + 0.7 * torch.rand(shape, generator=own)
        kept[layer] = scores > scores.flatten().kthvalue(round(config.pruning.sparsity * scores.numel())).values
    return Masks(kept)


def work_unscored(job: Job, execution: Execution, stopping: Stopping) -> None:
    """The questions have no answers to compare with."""
    if job.is_run:
        own = record(job)
        assert execution.store is not None
        write_text(predictions_path(execution.store, own), '{"question_id": 1, "answer": "blå"}\n')
        write(replace(own, metrics={}, floors={}) if own.config.task.name == "vqa" else own, execution)


def work_with_child(job: Job, execution: Execution, stopping: Stopping) -> None:
    """Work that starts a process of its own, as loaders do."""
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    assert child.exitcode == 0
    work(job, execution, stopping)


def work_slowly(job: Job, execution: Execution, stopping: Stopping) -> None:
    """The runs of SNIP never end."""
    _note(job, execution)
    if job.is_run and job.configs[0].pruning.method == "snip":
        time.sleep(600)
    work(job, execution, stopping)


def work_until_asked(job: Job, execution: Execution, stopping: Stopping) -> None:
    """The runs of SNIP go on until they are asked to stop, and then store where they were."""
    path = _note(job, execution)
    if job.is_run and job.configs[0].pruning.method == "snip":
        while not stopping():
            time.sleep(0.01)
        path.with_name("stored").write_text("where it was")
        return
    work(job, execution, stopping)


def work_broken(job: Job, execution: Execution, stopping: Stopping) -> None:
    """LAMP raises, SNIP gives NaN, OMP warns, and the statistics of MULTIFLOW fail."""
    method = job.configs[0].pruning.method
    if job.kind == "statistics":
        raise RuntimeError("no statistics")
    if method == "lamp" and job.is_run:
        raise RuntimeError("no\nluck")
    if method == "omp" and job.is_run:
        logging.getLogger("vlprune.fake").warning("cache damaged")
    if job.is_run:
        own = record(job)
        if method == "snip":
            own.metrics[next(iter(own.metrics))] = float("nan")
        write(own, execution)


def work_killed_once(job: Job, execution: Execution, stopping: Stopping) -> None:
    """OMP's worker dies at the first attempt, LAMP's at every one."""
    attempts = len(_note(job, execution).read_text().splitlines())
    method = job.configs[0].pruning.method
    if job.is_run and (method == "lamp" or (method == "omp" and attempts == 1)):
        os.kill(os.getpid(), 9)
    work(job, execution, stopping)


def work_with_a_broken_device(job: Job, execution: Execution, stopping: Stopping) -> None:
    """OMP's device fails at the first attempt, LAMP's at every one."""
    import torch

    attempts = len(_note(job, execution).read_text().splitlines())
    method = job.configs[0].pruning.method
    if job.is_run and (method == "lamp" or (method == "omp" and attempts == 1)):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    work(job, execution, stopping)


def work_convening(job: Job, execution: Execution, stopping: Stopping, convene: Callable) -> None:
    """Every pruned run waits for the other ranks; at LAMP's first attempt the first one dies."""
    method = job.configs[0].pruning.method
    if job.is_run and method != "dense":
        from torch import distributed

        attempts = len(_note(job, execution).read_text().splitlines())
        convene([SimpleNamespace(kind="tuned", key="key")])
        if method == "lamp" and attempts == 1:
            os.kill(os.getpid(), 9)
        distributed.barrier()
    work(job, execution, stopping)


def assist_noted(job: Job, execution: Execution, stopping: Stopping) -> None:
    """The other ranks come, but for OMP, where they raise, and for LAMP's second attempt, where they die."""
    from torch import distributed

    assert (job.kind, job.keys) == ("tuned", ("key",))
    path, method = _note(job, execution), job.configs[0].pruning.method
    if method == "omp":
        raise RuntimeError("no luck")
    if method == "lamp" and len(path.read_text().splitlines()) > 2:
        os.kill(os.getpid(), 9)
    path.with_name(f"{method}-{distributed.get_rank()}-of-{distributed.get_world_size()}").touch()
    distributed.barrier()


def work_on_a_full_disk(job: Job, execution: Execution, stopping: Stopping) -> None:
    """No run but that of the dense model can be stored."""
    if job.is_run and job.configs[0].pruning.method != "dense":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "record.json")
    work(job, execution, stopping)


def work_that_fails_alike(job: Job, execution: Execution, stopping: Stopping) -> None:
    """Every pruned run fails with the same message."""
    if job.is_run and job.configs[0].pruning.method != "dense":
        raise RuntimeError("a library is broken")
    work(job, execution, stopping)


def work_of_broken_lamp(job: Job, execution: Execution, stopping: Stopping) -> None:
    """Every run of LAMP fails with the same message."""
    if job.is_run and job.configs[0].pruning.method == "lamp":
        raise RuntimeError("LAMP is broken")
    work(job, execution, stopping)
