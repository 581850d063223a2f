"""Exact selection at the size of BLIP-base, against torch.kthvalue, np.partition and reading the scores at all.

    python experiments/benchmarks/selection.py [SCALE]

One thread. Writes results/benchmarks/selection.md. Takes about four minutes and 6 GB of memory; a SCALE below 1 makes
the layers narrower, for a quick look, and writes nothing. Times are of the processor, so that other work counts little.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from vlprune.selection import select_many

SPARSITIES = (0.63, 0.75, 0.9)
REPEATS = 3
# The prunable layers of BLIP-base: a ViT, an encoder with cross-attention, the decoder's own self-attention.
VISION = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
ENCODER = [(768, 768)] * 8 + [(3072, 768), (768, 3072)]
DECODER = [(768, 768)] * 4
BLIP = [*VISION * 12, *ENCODER * 12, *DECODER * 12]
N_EDGES = 226_492_416

Scores = dict[str, Tensor]
Kept = list[dict[str, Tensor]]


def make_scores(scale: float) -> Scores:
    """Magnitudes of random weights, layers of different scales."""
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for i, (out, n_in) in enumerate(BLIP):
        spread = 0.02 * (1 + i % 7)
        values = torch.empty(max(1, round(out * scale)), n_in).normal_(0, spread, generator=generator)
        scores[f"layer{i}"] = values.abs_()
    return scores


def ours(scores: Scores) -> Kept:
    """One call for all sparsities."""
    return select_many(scores, SPARSITIES, "model")


def kthvalue(scores: Scores) -> Kept:
    """The usual way: concatenate, the k-th value once a sparsity, compare."""
    every = torch.cat([values.flatten() for values in scores.values()])
    kept = []
    for sparsity in SPARSITIES:
        threshold = every.kthvalue(round(sparsity * len(every))).values
        kept.append({name: values > threshold for name, values in scores.items()})
    return kept


def partition(scores: Scores) -> Kept:
    """The fastest way in a few lines: concatenate, one partition for all sparsities, compare."""
    every = np.concatenate([values.numpy().ravel() for values in scores.values()])
    places = [round(sparsity * len(every)) - 1 for sparsity in SPARSITIES]
    parted = np.partition(every, places)
    return [{name: values > float(parted[place]) for name, values in scores.items()} for place in places]


def read(scores: Scores) -> Kept:
    """No selection: every score is read once, the limit that memory sets to finding a threshold."""
    assert max(float(values.max()) for values in scores.values()) > 0
    return []


def compare(scores: Scores) -> Kept:
    """No selection: given thresholds, every score is compared once a sparsity, the limit of writing the masks."""
    kept: Kept = [{} for _ in SPARSITIES]
    for name, values in scores.items():
        for masks, threshold in zip(kept, (0.05, 0.1, 0.2), strict=True):
            masks[name] = torch.from_numpy(np.greater_equal(values.numpy(), threshold))
    return kept


CONTENDERS: dict[str, Callable[[Scores], Kept]] = {f.__name__: f for f in (ours, kthvalue, partition, read, compare)}
EQUAL = ("kthvalue", "partition")  # whose masks must be ours but for ties


def measure(name: str, scale: float) -> dict:
    """Seconds, peak extra bytes beyond scores and masks, and pruned entries of one contender, in this process.

    Also in how many entries its masks differ from ours, where it selects at all.
    """
    scores = make_scores(scale)
    n = sum(values.numel() for values in scores.values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmHWM")
    start = time.process_time()
    kept = CONTENDERS[name](scores)
    seconds = time.process_time() - start
    extra = _status("VmHWM") - before - sum(mask.numel() for masks in kept for mask in masks.values())
    pruned = [n - sum(int(mask.sum()) for mask in masks.values()) for masks in kept]
    differ = []
    if name in EQUAL:
        differ = [sum(int((a[k] != b[k]).sum()) for k in scores) for a, b in zip(kept, ours(scores), strict=True)]
    return {"n": n, "seconds": seconds, "extra": extra, "pruned": pruned, "differ": differ}


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    """Measures and writes the table."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
        return
    scale = float(sys.argv[1]) if len(sys.argv) == 2 else 1.0
    runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(REPEATS):
        for name in CONTENDERS:
            done = subprocess.run(
                [sys.executable, __file__, name, str(scale)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[name][-1], flush=True)
    n = runs["ours"][0]["n"]
    assert scale != 1 or n == N_EDGES
    wanted = [round(sparsity * n) for sparsity in SPARSITIES]
    assert all(run["pruned"] == wanted for run in runs["ours"]), "an exact count is missed"
    for name in EQUAL:
        excess = [a - b for a, b in zip(runs[name][0]["pruned"], wanted, strict=True)]
        assert runs[name][0]["differ"] == excess, "the masks differ in more than tied scores"
    seconds = {name: median(run["seconds"] for run in all_runs) for name, all_runs in runs.items()}
    extra = {name: max(run["extra"] for run in all_runs) for name, all_runs in runs.items()}
    labels = {
        "kthvalue": "concatenate, `torch.kthvalue` once a sparsity",
        "partition": "concatenate, one `np.partition` for all sparsities",
        "ours": "`vlprune.selection.select_many`",
        "compare": "only the three masks, thresholds given",
        "read": "only reading the scores once",
    }
    rows = [
        f"| {label} | {seconds[name]:.2f} | {seconds['kthvalue'] / seconds[name]:.1f}× "
        f"| {seconds['partition'] / seconds[name]:.1f}× | {extra[name] / 2**20:.0f} |"
        for name, label in labels.items()
    ]
    limit = seconds["compare"] + seconds["read"]
    text = [
        "# Selection",
        "",
        f"`python experiments/benchmarks/selection.py`: torch {torch.__version__}, one thread, {n:,} float32 scores in "
        f"the shapes of BLIP-base, pruned at {', '.join(f'{100 * s:g} %' for s in SPARSITIES)}. Medians of {REPEATS} "
        "runs, each in a process of its own;",
        "extra memory is the peak beyond scores and masks.",
        "",
        "| | CPU seconds | faster than kthvalue | faster than partition | extra memory (MiB) |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        f"Every count is exact; the first two prune up to {max(excess)} tied scores too many, and all other "
        "entries agree. "
        f"Reading the scores once and writing the masks takes {limit:.2f} s: "
        f"selection takes {seconds['ours'] / limit:.1f} times what memory allows.",
        "",
    ]
    print("\n".join(text))
    if scale == 1:
        path = Path("results") / "benchmarks" / "selection.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(text))


if __name__ == "__main__":
    main()
