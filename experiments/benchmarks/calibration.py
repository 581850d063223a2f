"""What calibration costs over the passes that it looks at.

    python experiments/benchmarks/calibration.py

One thread. Writes results/benchmarks/calibration.md. Takes about four minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers

from vlprune.batch import Batch
from vlprune.calibrate.collect import collect
from vlprune.data import calibration_batches
from vlprune.models import find_model, load_model
from vlprune.models.base import ModelAdapter
from vlprune.models.blip import BLIP
from vlprune.models.tokenizer import load_tokenizer

# Pairs of a batch, batches of a measured pass, and how often both passes take turns.
SETTINGS = {"tiny-xvlm": [(4, 8, 15), (32, 4, 5)], "BLIP-base size": [(4, 1, 4)]}


def blip_base() -> ModelAdapter:
    """A random model of BLIP-base's size, on the vocabulary of tiny-blip."""
    tokenizer = load_tokenizer(find_model("tiny-blip") / "tokenizer.json")
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    tokens = {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 768,
        "pad_token_id": 0,
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "sep_token_id": tokenizer.convert_tokens_to_ids("[SEP]"),
        "is_decoder": True,
    }
    vision = {**width, "image_size": 224, "patch_size": 16, "initializer_range": 0.02}
    return BLIP(tokenizer, vision, {**width, **tokens}).eval()


def compare(plain: Callable[[], object], measured: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Median processor seconds of both, taken in turns, and the median of their ratios."""
    seconds: list[tuple[float, float]] = []
    for i in range(pairs + 1):
        both = {}
        for function in (plain, measured) if i % 2 else (measured, plain):
            start = time.process_time()
            function()
            both[function] = time.process_time() - start
        seconds.append((both[plain], both[measured]))
    del seconds[0]  # warm-up
    return median(a for a, _ in seconds), median(b for _, b in seconds), median(b / a for a, b in seconds)


def costs(name: str, model: ModelAdapter, batch: Batch, calls: int, repeats: int) -> list[str]:
    """A row for each kind of pass."""
    weights = [model.weight(layer.name) for layer in model.graph]

    def forward() -> None:
        with torch.no_grad():
            model.calibration_forward(batch)

    def backward() -> None:
        losses = model.pretraining_losses(batch, torch.Generator().manual_seed(0))
        torch.autograd.grad(torch.stack([losses[loss] for loss in model.scored_losses]).sum(), weights)

    rows = []
    for label, plain, needs in (
        ("forward: input_sq", forward, {"input_sq"}),
        ("forward: input_sq, input_outer", forward, {"input_sq", "input_outer"}),
        ("forward + backward: input_sq, grad", backward, {"input_sq", "grad", "row_size"}),
    ):
        # One call measures several batches: what a pass begins and ends with is there once.
        a, b, ratio = compare(
            lambda plain=plain: [plain() for _ in range(calls)],
            lambda needs=needs: collect(model, [batch] * calls, needs),
            repeats,
        )
        rows.append(f"| {name} | {len(batch.images)} | {label} | {a / calls:.4f} | {b / calls:.4f} | {ratio:.3f} |")
        print(rows[-1], flush=True)
    return rows


def memory(n_batches: int) -> int:
    """Peak resident bytes of a process that collects all sums from so many batches."""
    code = (
        "import vlprune as vp; from vlprune.calibrate.collect import collect\n"
        "model = vp.load_model('tiny-xvlm')\n"
        f"batches = vp.calibration_batches('scenes', model, n_batches={n_batches}, batch_size=4, seed=0)\n"
        "collect(model, batches, {'input_sq', 'input_outer', 'grad', 'grad_sq', 'row_size'})\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024


def main() -> None:
    """Measures and writes the tables."""
    rows = []
    for name, model in (("tiny-xvlm", load_model("tiny-xvlm")), ("BLIP-base size", blip_base())):
        for size, calls, repeats in SETTINGS[name]:
            [batch] = calibration_batches("scenes", model, n_batches=1, batch_size=size, seed=0)
            rows += costs(name, model, batch, calls, repeats)
    peaks = {n: memory(n) for n in (4, 64)}
    text = [
        "# Calibration",
        "",
        f"`python experiments/benchmarks/calibration.py`: torch {torch.__version__}, transformers "
        f"{transformers.__version__}, one thread. The plain and the measuring pass take turns;",
        "processor seconds a batch are medians, the ratio is the median of the ratios of neighbours.",
        "",
        "| model | batch | pass and what it measures | plain (s) | measured (s) | ratio |",
        "|---|--:|---|--:|--:|--:|",
        *rows,
        "",
        "Peak memory of a process that measures all sums on tiny-xvlm: "
        + ", ".join(f"{peak / 2**20:.0f} MiB with {n} batches" for n, peak in peaks.items())
        + ".",
        "",
    ]
    path = Path("results") / "benchmarks" / "calibration.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
