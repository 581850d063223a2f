"""CHITA at the size of BLIP-base, with its cost model.

    python experiments/benchmarks/chita_full_size.py

One thread. Writes results/benchmarks/chita_full_size.md. Takes about four minutes, 5 GB of memory and 10 GB of disk.
Times are of the processor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from vlprune.calibrate.rows import Rows, WithRows
from vlprune.pruners.chita import ChitaOptions, chita_update, solver

LAM = 1e-2
SPARSITY = 0.75
# The prunable layers of BLIP-base, 226,492,416 weights.
VISION = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
ENCODER = [(768, 768)] * 8 + [(3072, 768), (768, 3072)]
DECODER = [(768, 768)] * 4
BLIP = [*VISION * 12, *ENCODER * 12, *DECODER * 12]
# Parts of BLIP for the cost model: (blocks of layers, rows).
SIZES = [(1, 8), (4, 8), (12, 8), (4, 32)]
GIB = 2**30


def shapes(n_blocks: int) -> list[tuple[int, int]]:
    """The layers of that many blocks of each of BLIP's three stacks."""
    return [*VISION * n_blocks, *ENCODER * n_blocks, *DECODER * n_blocks]


def _run(*arguments: object) -> dict:
    """What a process of its own measures."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def one_size(n_blocks: int, n_rows: int) -> dict[str, float]:
    """Processor seconds of the stages and peak bytes of one CHITA step on random gradients, in this process."""
    stages: dict[str, float] = defaultdict(float)
    generator = torch.Generator().manual_seed(0)
    layers = {f"layer{i}": shape for i, shape in enumerate(shapes(n_blocks))}
    weights = {name: torch.empty(shape).normal_(0, 0.03, generator=generator) for name, shape in layers.items()}
    before = _peak()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        rows = Rows(Path(directory), memory_limit=0)
        for _ in range(n_rows):
            for name, shape in layers.items():
                gradient = torch.empty(shape).normal_(0, 0.01, generator=generator)
                with _timed(stages, "rows to disk"):
                    rows.append(name, gradient)
        stats = {name: WithRows({"row_size": torch.tensor(64.0)}, rows, name) for name in layers}
        solve_blocks = solver._solve_blocks
        solver._solve_blocks = _timing(stages, "blocks", solve_blocks)
        p = sum(weight.numel() for weight in weights.values())
        with _timed(stages, "all"):
            masks = chita_update(
                weights, stats, n_pruned=round(SPARSITY * p), alive=None, options=ChitaOptions(lam=LAM)
            )
        assert sum(int(mask.sum()) for mask in masks.values()) == p - round(SPARSITY * p)
    stages["first-order term and global step"] = stages.pop("all") - stages["blocks"]
    return {"p": p, "n": n_rows, "peak": _peak(), "weights": before, **stages}


def _timed(stages: dict[str, float], stage: str):
    class Timer:
        def __enter__(self) -> None:
            self.start = time.process_time()

        def __exit__(self, *_: object) -> None:
            stages[stage] += time.process_time() - self.start

    return Timer()


def _timing(stages: dict[str, float], stage: str, function):
    def timed(*arguments):
        with _timed(stages, stage):
            return function(*arguments)

    return timed


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def at_scale() -> list[str]:
    """Rows of the table: each size in a process of its own."""
    measured = []
    for n_blocks, n_rows in SIZES:
        measured.append(_run(n_blocks, n_rows))
        print(measured[-1], flush=True)
    # seconds = a p + b n p, from the two sizes of equal p; bytes = 4 p of weights + c p + rest, from the two smallest.
    few, many = measured[1], measured[3]
    b = (_solving(many) - _solving(few)) / (few["p"] * (many["n"] - few["n"]))
    a = _solving(few) / few["p"] - b * few["n"]
    per_weight = (few["peak"] - measured[0]["peak"]) / (few["p"] - measured[0]["p"])
    rest = measured[0]["peak"] - per_weight * measured[0]["p"]
    lines = []
    for m in measured:
        seconds, peak = m["p"] * (a + b * m["n"]), rest + per_weight * m["p"]
        lines.append(
            f"| {m['p']:,} | {m['n']} | {m['rows to disk']:.1f} | {m['first-order term and global step']:.1f} "
            f"| {m['blocks']:.1f} | {seconds:.1f} | {m['peak'] / GIB:.2f} | {peak / GIB:.2f} "
            f"| {4 * m['n'] * m['p'] / GIB:.2f} |"
        )
    model = (
        f"A step takes {1e9 * a:.0f} ns a weight plus {1e9 * b:.1f} ns a weight and row (fitted to the second and the "
        f"last line); peak memory is {rest / GIB:.2f} GiB plus {per_weight:.1f} bytes a weight, its own 4 included "
        "(fitted to the first two), plus what is mapped of the rows of one layer; the rows take 4 n p bytes of disk. "
        "CHITA++ takes its number of steps times that, in the same memory and disk."
    )
    return [*lines, "", model]


def _solving(measured: dict[str, float]) -> float:
    return measured["first-order term and global step"] + measured["blocks"]


def main() -> None:
    """Measures and writes the table."""
    if len(sys.argv) == 3:
        print(json.dumps(one_size(int(sys.argv[1]), int(sys.argv[2]))))
        return
    assert sum(out * n_in for out, n_in in BLIP) == 226_492_416
    text = [
        "# CHITA at the size of BLIP-base",
        "",
        f"`python experiments/benchmarks/chita_full_size.py`: torch {torch.__version__}, one thread, λ = {LAM:g}, "
        f"sparsity {100 * SPARSITY:g} %, random weights and gradients.",
        "",
        "Gradient rows on disk (memory limit 0); every size in a process of its own. CPU seconds by stage, the rest is "
        "drawing random numbers; peak resident memory of the process, weights included.",
        "",
        "| weights | rows | rows to disk (s) | global step (s) | blocks (s) | model (s) | peak (GiB) | model (GiB) "
        "| disk (GiB) |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *at_scale(),
        "",
    ]
    path = Path("results") / "benchmarks" / "chita_full_size.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
