"""What pruning costs at the size of BLIP-base and X-VLM-base: `python experiments/benchmarks/full_size.py`.

One thread. Weights are random, configurations real. A process for each model and set of methods prunes at 63, 75 and
90 % in one call of `vlprune.prune`, batch 4, and writes the masks; each stage's processor seconds and peak memory go
into results/benchmarks/full_size.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from vlprune.models import build_model, load_model, save_model
from vlprune.models.tokenizer import add_blip_tokens, bert_tokenizer

WIDTH = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
VISION = {**WIDTH, "image_size": 224, "patch_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "BLIP-base": {
        "family": "blip",
        "vision": {**VISION, "layer_norm_eps": 1e-6, "initializer_range": 0.02},
        "text": {**WIDTH, "vocab_size": 30524, "encoder_hidden_size": 768, "label_smoothing": 0.1},
    },
    "X-VLM-base": {
        "family": "xvlm",
        "vision": VISION,
        "text": {**WIDTH, "vocab_size": 30522},
        "fusion_layer": 6,
    },
}
SETS = {"activations": "multiflow", "all four": "multiflow,omp,lamp,snip"}
BATCHES, BATCH_SIZE = 4, 4

RUN = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
from rich.console import Console
from vlprune import cost
from vlprune.prune import Arguments, prune
model, methods, out, n_batches, batch_size = sys.argv[1:]
arguments = Arguments(model=model, method=methods, sparsity="0.63,0.75,0.9", out=Path(out), calibration="scenes",
                      n_batches=int(n_batches), batch_size=int(batch_size), masks_only=True)
cost.time = SimpleNamespace(perf_counter=time.process_time)  # seconds of the processor: other work counts little
costs = prune(arguments, Console(quiet=True)).costs
print(json.dumps([(step, own.seconds, own.peak_memory) for step, own in costs]))
"""


def make(name: str, directory: Path) -> None:
    """A random model of full size in a directory."""
    torch.manual_seed(0)
    config = MODELS[name]
    tokenizer = bert_tokenizer()
    if config["family"] == "blip":
        add_blip_tokens(tokenizer)
    ids = {"pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 102}
    ids["bos_token_id"] = 30522 if config["family"] == "blip" else 101
    save_model(build_model({**config, "text": {**config["text"], **ids}}, tokenizer), directory)


def main() -> None:
    """Measures and writes the table."""
    rows, edges = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            directory = Path(scratch) / name
            make(name, directory)
            edges[name] = load_model(str(directory)).graph.n_edges
            for label, methods in SETS.items():
                out = str(Path(scratch) / f"{name} {label}")
                arguments = [str(directory), methods, out, str(BATCHES), str(BATCH_SIZE)]
                done = subprocess.run(
                    [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True
                )
                stages = json.loads(done.stdout.splitlines()[-1])
                written = [stage for stage in stages if stage[0].startswith("write ")]
                kept = [stage for stage in stages if stage not in written]
                kept.append([f"write {len(written)} masks", sum(s for _, s, _ in written), max(p for *_, p in written)])
                kept.append(["all", sum(s for _, s, _ in kept), max(p for *_, p in kept)])
                for stage, seconds, peak in kept:
                    rows.append(f"| {name} | {label} | {stage} | {seconds:.1f} | {peak / 2**30:.2f} |")
                    print(rows[-1], flush=True)
    text = [
        "# Pruning at full size",
        "",
        f"`python experiments/benchmarks/full_size.py`: torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} thread, float32 on a CPU.",
        f"Random weights in the real configurations, {BATCHES} calibration batches of {BATCH_SIZE} pairs at 224 "
        "pixels; 63, 75 and 90 % in one call. Prunable weights: "
        + ", ".join(f"{name} {count:,}" for name, count in edges.items())
        + ".",
        "",
        "| model | methods | stage | CPU seconds | peak memory, GiB |",
        "|---|---|---|--:|--:|",
        *rows,
        "",
    ]
    path = Path("results") / "benchmarks" / "full_size.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
