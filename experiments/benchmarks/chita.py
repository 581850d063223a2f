"""CHITA's solver against the same algorithm in NumPy and in loops that numba compiles.

    python -m pip install numba scipy
    python experiments/benchmarks/chita.py

One thread. Writes results/benchmarks/chita.md. Takes about two minutes and 5 GB of memory. The solvers take turns in
one process; times are of the processor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import dense_chita
import numba  # pyright: ignore[reportMissingImports]
import numba_chita
import numpy as np
import torch

from vlprune.pruners.chita import solve

LAM = 1e-2
SPARSITY = 0.75
P, N_ROWS = 2_000_000, 50
ROUNDS = 3


def compared(size: int) -> str:
    """A row of the table, for blocks of this size."""
    generator = torch.Generator().manual_seed(0)
    w = 0.03 * torch.randn(P, generator=generator)
    rows = 0.01 * torch.randn(N_ROWS, P, generator=generator)
    alpha, n_keep, damping = rows.sum(0) / 32, P - round(SPARSITY * P), N_ROWS * LAM / 2
    blocks = list(range(0, P + 1, size))
    dense = [tensor.double().numpy() for tensor in (w, rows, alpha)]
    solvers: dict[str, Callable[[], np.ndarray]] = {
        "NumPy": lambda: dense_chita.solve(dense[0], dense[1], n_keep, dense[2], damping, blocks),
        "numba": lambda: numba_chita.solve(dense[0], dense[1], n_keep, dense[2], damping, np.array(blocks)),
        "vlprune": lambda: solve(w, rows, n_keep, alpha, damping, blocks).double().numpy(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    values = {}
    for _ in range(ROUNDS + 1):
        for name, solver in solvers.items():
            start = time.process_time()
            values[name] = solver()
            seconds[name].append(time.process_time() - start)
    for own in seconds.values():
        del own[0]  # compiles
    faster = {
        name: median(a / b for a, b in zip(seconds[name], seconds["vlprune"], strict=True))
        for name in ("NumPy", "numba")
    }
    equal = all(((values[name] != 0) == (values["vlprune"] != 0)).all() for name in faster)
    objective = {
        name: dense_chita.objective(dense[0], dense[1], found, dense[2], damping) for name, found in values.items()
    }
    return (
        f"| {P // size:,} blocks of {size:,} | {median(seconds['NumPy']):.2f} | {median(seconds['numba']):.2f} "
        f"| {median(seconds['vlprune']):.2f} | {faster['NumPy']:.1f}× | {faster['numba']:.1f}× "
        f"| {'equal' if equal else 'not equal'} | {objective['vlprune'] - objective['NumPy']:+.1e} |"
    )


def main() -> None:
    """Measures and writes the table."""
    rows = []
    for size in (10_000, 400):
        rows.append(compared(size))
        print(rows[-1], flush=True)
    text = [
        "# CHITA",
        "",
        f"`python experiments/benchmarks/chita.py`: torch {torch.__version__}, numpy {np.__version__}, numba "
        f"{numba.__version__}, one thread, λ = {LAM:g}, sparsity {100 * SPARSITY:g} %, random weights and gradients.",
        "",
        f"{P:,} weights, {N_ROWS} rows; the same algorithm in `dense_chita.py` and `numba_chita.py`, float64. The "
        f"solvers take turns in one process: CPU seconds, medians of {ROUNDS} rounds and of the ratios in them.",
        "",
        "| blocks | NumPy (s) | numba (s) | vlprune (s) | faster than NumPy | than numba | survivors "
        "| objective, vlprune − NumPy |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *rows,
        "",
    ]
    path = Path("results") / "benchmarks" / "chita.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
