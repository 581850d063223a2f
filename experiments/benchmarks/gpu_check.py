"""Whether everything works on a GPU, in ten minutes: `python experiments/benchmarks/gpu_check.py`.

Each line of the table that it prints is one of docs/devices.md: what was computed on the GPU and on the processor, and
how far both agree. It ends with 0 where nothing failed, with 1 where something did, with 2 where there is no GPU. What
needs two GPUs is not tried on one. `--device cpu` compares the processor with itself, which shows that the script
works.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from torch import Tensor

from eval import TASKS
from vlprune.calibrate.collect import collect
from vlprune.calibrate.rows import Rows
from vlprune.config import FinetuningConfig
from vlprune.data import calibration_batches, load_pairs
from vlprune.execution import Execution, Interrupted
from vlprune.finetune.checkpoint import Checkpoint
from vlprune.finetune.loop import finetune
from vlprune.masks import Masks, apply_masks
from vlprune.models import ModelAdapter, load_model
from vlprune.selection import WITHIN, select
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.masks import compute_masks
from vlprune.store.record import load_records
from vlprune.sweep.engine import execute
from vlprune.sweep.job import Job
from vlprune.sweep.local import LocalPool
from vlprune.sweep.planner import plan
from vlprune.sweep.table import load_table
from vlprune.sweep.worker import work

MODEL, DATA, TASK = "tiny-xvlm", "scenes", "retrieval"
TABLE = f"""
[base.calibration]
n_batches = 2
[base.finetuning]
steps = 5
[[grid]]
models = ["{MODEL}"]
methods = ["multiflow"]
sparsities = [0.75]
tasks = ["{TASK}"]
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]

Line = tuple[str, float, str]


class NotTried(Exception):
    """What this machine is not made for; the message is why."""


# ---- what is computed on either device; plain values come back ----


def selection(device: str) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    scores = {str(n): torch.rand(60, 50 + n, generator=draws).mul(40).round().to(device) for n in range(4)}
    modality = {name: "vision" if name < "2" else "text" for name in scores}
    return {
        f"{within} {name}": kept.cpu()
        for within in WITHIN
        for name, kept in select(scores, 0.63, within, modality).items()
    }


def _measured(device: str, needs: set[str], rows: Rows | None = None) -> tuple[ModelAdapter, Any]:
    model = load_model(MODEL).to(device)
    return model, collect(model, calibration_batches(DATA, model, n_batches=2, batch_size=8, seed=0), needs, rows=rows)


def statistics(device: str) -> dict[str, Tensor]:
    _, found = _measured(device, {"input_sq", "grad"})
    return {f"{layer} {name}": value.cpu() for layer, own in found.items() for name, value in own.items()}


def masks(device: str) -> dict[str, Tensor]:
    model, found = _measured(device, {"input_sq", "grad"})
    methods = ("omp", "lamp", "snip", "multiflow", "wanda")
    made = {method: compute_masks(model, method, 0.75, stats=found) for method in methods}
    return {f"{method} {layer}": mask.cpu() for method, own in made.items() for layer, mask in own.items()}


def gradient_rows(device: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        rows = Rows(Path(directory), memory_limit=0)  # through files of the host
        _, found = _measured(device, {"grad_rows"}, rows)
        return {layer: own["grad_rows"].cpu().clone() for layer, own in found.items()}


def _trained(
    device: str, precision: Literal["fp32", "bf16"] = "fp32", checkpoint: Checkpoint | None = None
) -> dict[str, Tensor]:
    model, data = load_model(MODEL).to(device), cast(Any, load_pairs(DATA, "train", 64))
    draws = torch.Generator().manual_seed(0)
    kept = Masks({own.name: (torch.rand(own.shape, generator=draws) < 0.5).to(device) for own in model.graph})
    apply_masks(model, kept)
    torch.manual_seed(0)
    model.add_task_head(TASK)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its draws are those of the device
    config: Any = FinetuningConfig(steps=6, batch_size=16, device_batch=8, lr=1e-4, precision=precision)
    losses = finetune(model, kept, model.layer_of, data, TASKS[TASK].loss, config, 0, checkpoint=checkpoint)
    revived = sum(int(model.weight(name)[~mask].count_nonzero()) for name, mask in kept.items())
    return {"losses": torch.tensor(losses), "revived weights": torch.tensor(revived)}


def training_fp32(device: str) -> dict[str, Tensor]:
    return _trained(device)


def training_bf16(device: str) -> dict[str, Tensor]:
    return _trained(device, "bf16")


def checkpoint(device: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        path, left = Path(directory) / "state", iter(range(3))
        try:
            _trained(device, checkpoint=Checkpoint(path, 1e9, lambda: next(left, None) is None))
        except Interrupted:
            return _trained(device, checkpoint=Checkpoint(path, 1e9))
    raise AssertionError("training was not interrupted")


def evaluation(device: str) -> dict[str, Tensor]:
    found = {}
    model = load_model(MODEL).to(device)
    with torch.inference_mode():
        for name in ("retrieval", "captioning"):
            task, data = TASKS[name], load_pairs(DATA, "test", 24)
            said = task.predict(model, data, task.options(), None)
            metrics = task.score(said, data.remove_columns("image").to_list())
            found[name] = torch.tensor(list(metrics.values()))
    return found


def numbers(device: str, file: Path) -> None:
    """Leaves {name: (what was computed, or the error in words, seconds)} in a file."""
    torch.set_num_threads(1)
    found: dict[str, tuple[Any, float]] = {}
    for name, (compute, _) in COMPARED.items():
        began = time.monotonic()
        try:
            value: Any = compute(device)
        except Exception as error:
            value = " ".join(f"{type(error).__name__}: {error}".split())
        found[name] = value, time.monotonic() - began
    torch.save(found, file)


# ---- how far two devices agree; the words, or an AssertionError ----


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    differ = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not differ, f"{len(differ)} of {len(theirs)} differ, the first is {differ[0]}"
    return "equal bits"


def within(tolerance: float) -> Callable[[dict[str, Tensor], dict[str, Tensor]], str]:
    def near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
        apart = {
            name: float((ours[name] - value).double().norm() / value.double().norm().clamp_min(1e-12))
            for name, value in theirs.items()
        }
        worst = max(apart, key=lambda name: apart[name])
        assert apart[worst] <= tolerance, f"{worst} is {apart[worst]:.1e} apart, more than {tolerance:g}"
        return f"at most {apart[worst]:.1e} apart"

    return near


def overlap(least: float) -> Callable[[dict[str, Tensor], dict[str, Tensor]], str]:
    def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
        same = sum(int((ours[name] == mask).sum()) for name, mask in theirs.items())
        share = same / sum(mask.numel() for mask in theirs.values())
        assert share >= least, f"{100 * share:.3f} % of the entries are alike, fewer than {100 * least:g} %"
        return f"{100 * share:.3f} % of the entries are alike"

    return alike


COMPARED: dict[str, tuple[Callable[[str], dict[str, Tensor]], Callable[..., str]]] = {
    "selection": (selection, equal),
    "statistics": (statistics, within(1e-3)),
    "masks": (masks, overlap(0.999)),
    "gradient rows": (gradient_rows, within(1e-3)),
    "fine-tuning, fp32": (training_fp32, within(1e-2)),
    "fine-tuning, bf16": (training_bf16, within(5e-2)),
    "checkpoint": (checkpoint, within(1e-2)),
    "evaluation": (evaluation, within(5e-2)),
}


# ---- whole sweeps ----


def _swept(device: str, results: Path, launcher: list[str]) -> dict[str, dict[str, float]]:
    """{key: metrics} of a small table."""
    table = results.with_suffix(".toml")
    table.write_text(TABLE)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    command = [sys.executable, *launcher, "-m", "vlprune.sweep", str(table), "--limit", "48", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden})
    assert done.returncode == 0, " ".join((done.stdout + done.stderr).split())[-300:]
    return {record.key: record.metrics for record in load_records(results)}


def _metrics_alike(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> str:
    assert ours.keys() == theirs.keys(), "not the same runs"
    apart = max(abs(ours[key][name] - value) for key, own in theirs.items() for name, value in own.items())
    assert apart <= 5, f"a metric is {apart:.2f} points apart"
    return f"metrics at most {apart:.2f} points apart"


def sweep(device: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        roots = [Path(directory) / name for name in ("here", "there")]
        return _metrics_alike(*(_swept(where, root, []) for where, root in zip((device, "cpu"), roots, strict=True)))


def launch(device: str) -> str:
    if device == "cuda" and torch.cuda.device_count() < 2:
        raise NotTried("needs two GPUs")
    with tempfile.TemporaryDirectory() as directory:
        roots = [Path(directory) / name for name in ("two", "one")]
        return _metrics_alike(*(_swept(device, root, own) for root, own in zip(roots, (LAUNCH, []), strict=True)))


def work_after_an_assertion(job: Job, execution: Execution, stopping: Callable[[], bool]) -> None:
    """The first worker's kernel fails an assertion; the second does the job."""
    assert execution.store is not None
    try:
        (execution.store / "failed").touch(exist_ok=False)
    except FileExistsError:
        return work(job, execution, stopping)
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].cpu()


def device_error(device: str) -> str:
    if device == "cpu":
        raise NotTried("needs a GPU")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "t.toml").write_text(TABLE)
        own = plan(load_table(root / "t.toml", limit=48), Fingerprints())
        execution = Execution(root)
        pool = LocalPool(work_after_an_assertion, execution, 1)
        kinds = [e.kind for e in execute(own.jobs(own.runs[:1], root), pool, execution) if e.kind != "warned"]
    assert kinds == ["started", "retried", "started", "finished"], f"the worker's job went {', '.join(kinds)}"
    return "a new worker did the job"


WHOLE: dict[str, Callable[[str], str]] = {
    "sweep": sweep,
    "error of a device": device_error,
    "accelerate launch": launch,
}


def on_both(device: str) -> list[dict[str, tuple[Any, float]]]:
    """The numbers of the device and of the processor, each from a process of its own: accelerate knows one device."""
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / name for name in ("ours", "theirs")]
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(numbers, (device, "cpu"), files))
        return [torch.load(file) for file in files]


def compared(ours: dict[str, tuple[Any, float]], theirs: dict[str, tuple[Any, float]]) -> dict[str, Line]:
    """{name: "ok" or "failed", seconds, words} of what was computed on both devices."""
    lines = {}
    for name, (_, agree) in COMPARED.items():
        (own, seconds), (other, _) = ours[name], theirs[name]
        try:
            errors = [value for value in (own, other) if isinstance(value, str)]
            assert not errors, errors[0]
            lines[name] = "ok", seconds, agree(own, other)
        except AssertionError as error:
            lines[name] = "failed", seconds, str(error)
    return lines


def whole(device: str) -> dict[str, Line]:
    """{name: "ok", "failed" or "not tried", seconds, words} of the sweeps."""
    lines = {}
    for name, check in WHOLE.items():
        began = time.monotonic()
        try:
            state, words = "ok", check(device)
        except NotTried as why:
            state, words = "not tried", str(why)
        except Exception as error:
            state, words = "failed", " ".join(f"{type(error).__name__}: {error}".split())
        lines[name] = state, time.monotonic() - began, words
    return lines


@dataclass(frozen=True)
class Settings:
    """Compares what runs on a GPU with the processor, and prints a table.

    Attributes:
        device: the device to check; cpu tries the script itself.
        without_sweeps: only compare numbers.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    without_sweeps: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the exit code."""
    options = tyro.cli(Settings, args=arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu tries the script itself", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the processor"
    versions = json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda})
    print(f"{name}, {versions}\n\n| | | seconds | |\n|---|---|---:|---|")
    lines = compared(*on_both(options.device)) | ({} if options.without_sweeps else whole(options.device))
    for what, (state, seconds, words) in lines.items():
        print(f"| {what} | {state} | {seconds:.0f} | {words} |")
    return 1 if any(state == "failed" for state, _, _ in lines.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
