"""CHITA's solver: against dense NumPy, and at the size of BLIP, with its cost model.

    python experiments/benchmarks/chita.py

One thread. Writes results/benchmarks/chita.md. Takes about five minutes, 6 GB of memory and 10 GB of disk.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import dense_chita
import numpy as np
import torch

from vlprune.calibrate.rows import Rows, WithRows
from vlprune.pruners.chita import ChitaOptions, chita_update, solve, solver

LAM = 1e-2
SPARSITY = 0.75
P, N_ROWS = 4_000_000, 50  # of the comparison with NumPy
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


def against_numpy(repeats: int = 3) -> list[str]:
    """Rows of the table: both in turns, each in a process of its own."""
    lines = []
    for size in (10_000, 400):
        runs = {name: [_run(name, size) for _ in range(repeats)] for name in ("ours", "numpy")}
        seconds = {name: median(run["seconds"] for run in own) for name, own in runs.items()}
        ours, theirs = runs["ours"][0], runs["numpy"][0]
        survivors = "equal" if ours["support"] == theirs["support"] else "not equal"
        lines.append(
            f"| {P // size:,} blocks of {size:,} | {seconds['numpy']:.2f} | {seconds['ours']:.2f} "
            f"| {seconds['numpy'] / seconds['ours']:.1f}× | {survivors} "
            f"| {ours['objective'] - theirs['objective']:+.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def one_solution(name: str, size: int) -> dict[str, float | str]:
    """Seconds, objective and survivors of one of the two solvers, in this process."""
    generator = torch.Generator().manual_seed(0)
    w = 0.03 * torch.randn(P, generator=generator)
    rows = 0.01 * torch.randn(N_ROWS, P, generator=generator)
    alpha, n_keep, damping = rows.sum(0) / 32, P - round(SPARSITY * P), N_ROWS * LAM / 2
    blocks = list(range(0, P + 1, size))
    dense = [tensor.double().numpy() for tensor in (w, rows, alpha)]
    start = time.perf_counter()
    if name == "ours":
        values = solve(w, rows, n_keep, alpha, damping, blocks).double().numpy()
    else:
        values = dense_chita.solve(dense[0], dense[1], n_keep, dense[2], damping, blocks)
    seconds = time.perf_counter() - start
    objective = dense_chita.objective(dense[0], dense[1], values, dense[2], damping)
    support = hashlib.sha256(np.packbits(values != 0).tobytes()).hexdigest()
    return {"seconds": seconds, "objective": objective, "support": support}


def _run(*arguments: object) -> dict:
    """What a process of its own measures."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def one_size(n_blocks: int, n_rows: int) -> dict[str, float]:
    """Seconds of the stages and peak memory (bytes) of one CHITA step on random gradients, in this process."""
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
            self.start = time.perf_counter()

        def __exit__(self, *_: object) -> None:
            stages[stage] += time.perf_counter() - self.start

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
    """Measures and writes the tables."""
    if len(sys.argv) == 3:
        first, second = sys.argv[1:]
        measured = one_size(int(first), int(second)) if first.isdigit() else one_solution(first, int(second))
        print(json.dumps(measured))
        return
    assert sum(out * n_in for out, n_in in BLIP) == 226_492_416
    text = [
        "# CHITA",
        "",
        f"`python experiments/benchmarks/chita.py`: torch {torch.__version__}, numpy {np.__version__}, one thread, "
        f"λ = {LAM:g}, sparsity {100 * SPARSITY:g} %, random weights and gradients.",
        "",
        "## Against dense NumPy",
        "",
        f"{P:,} weights, {N_ROWS} rows; the same algorithm in `dense_chita.py`, float64. Medians of three runs, each "
        "in a process of its own.",
        "",
        "| blocks | NumPy (s) | vlprune (s) | faster | survivors | objective, vlprune − NumPy |",
        "|---|--:|--:|--:|--:|--:|",
        *against_numpy(),
        "",
        "## At the size of BLIP-base",
        "",
        "Gradient rows on disk (memory limit 0); every size in a process of its own. Seconds by stage, the rest is "
        "drawing random numbers; peak resident memory of the process, weights included.",
        "",
        "| weights | rows | rows to disk (s) | global step (s) | blocks (s) | model (s) | peak (GiB) | model (GiB) "
        "| disk (GiB) |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *at_scale(),
        "",
    ]
    path = Path("results") / "benchmarks" / "chita.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
