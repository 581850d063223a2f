"""CHITA against dense NumPy, and what a large problem needs of it."""

import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.masks import mask_hash
from vlprune.pruners import PRUNERS, prune_masks
from vlprune.pruners.chita import ChitaOptions, chita_update, solve_support

ROOT = Path(__file__).parents[1]


def load_dense():
    path = ROOT / "experiments" / "benchmarks" / "dense_chita.py"
    spec = importlib.util.spec_from_file_location("dense_chita", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dense_chita = load_dense()


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 60),
    st.integers(1, 12),
    st.floats(-4, 1),
    st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    st.data(),
)
def test_the_solver_is_that_of_dense_numpy(seed, p, n, log_damping, first_order, data):
    """Supports and values; a large first-order term sends blocks into the line search."""
    generator = np.random.default_rng(seed)
    w, rows = generator.normal(size=p), generator.normal(size=(n, p))
    alpha, damping = first_order * generator.normal(size=p), 10**log_damping
    n_keep = data.draw(st.integers(0, p))
    blocks = sorted({0, p, *data.draw(st.lists(st.integers(0, p), max_size=4))})
    wanted = dense_chita.solve(w, rows, n_keep, alpha, damping, blocks)
    tensors = [torch.from_numpy(array) for array in (w, rows, alpha)]
    beta, support = solve_support(tensors[0], tensors[1], n_keep, tensors[2], damping, blocks)
    np.testing.assert_array_equal(support.numpy(), wanted != 0)
    scale = 1 + np.abs(wanted).max()
    np.testing.assert_allclose(beta.numpy(), wanted, rtol=1e-6, atol=1e-9 * scale / damping)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 30), st.sampled_from([1.0, 30.0]))
def test_blocks_solved_together_are_those_solved_alone(seed, n_blocks, size, first_order):
    generator = torch.Generator().manual_seed(seed)
    p = n_blocks * size
    w, alpha = torch.randn(2, p, generator=generator, dtype=torch.float64)
    rows = torch.randn(5, p, generator=generator, dtype=torch.float64)
    boundaries = list(range(0, p + 1, size))
    beta, support = solve_support(w, rows, p // 3, alpha * first_order, 0.1, boundaries)
    numpy = dense_chita.solve(*(t.numpy() for t in (w, rows)), p // 3, (alpha * first_order).numpy(), 0.1, boundaries)
    for start, end in pairwise(boundaries):
        np.testing.assert_array_equal(support[start:end].numpy(), numpy[start:end] != 0)
        np.testing.assert_allclose(beta[start:end].numpy(), numpy[start:end], rtol=1e-7, atol=1e-9)


def large_problem(n=6):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (300, 200), "b": (64, 64), "c": (120, 500)}
    weights = {name: 0.03 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    stats = {}
    for name, weight in weights.items():
        rows = 0.02 * torch.randn(n, weight.numel(), generator=generator)
        stats[name] = {"grad_rows": rows, "row_size": torch.tensor(16.0)}
    return weights, stats


@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1.0])
def test_float32_layers_agree_with_dense_float64(lam):
    """Layers of several blocks, one of them smaller than a block: what the update makes of rows and weights."""
    weights, stats = large_problem()
    p = sum(weight.numel() for weight in weights.values())
    masks = chita_update(weights, stats, n_pruned=round(0.75 * p), alive=None, options=ChitaOptions(lam=lam))
    w = np.concatenate([weight.flatten() for weight in weights.values()]).astype(np.float64)
    rows = np.concatenate([of_layer["grad_rows"] for of_layer in stats.values()], axis=1).astype(np.float64)
    blocks = [0, *range(10_000, 60_001, 10_000), 64_096, *range(74_096, 124_097, 10_000)]
    wanted = dense_chita.solve(w, rows, p - round(0.75 * p), rows.sum(0) / 16, len(rows) * lam / 2, blocks)
    ours = np.concatenate([values.flatten() for values in masks.weights.values()])
    same = (ours != 0) == (wanted != 0)
    assert (~same).sum() <= 2  # float32 against float64: an entry at the very threshold
    np.testing.assert_allclose(ours[same], wanted[same], atol=2e-4 * np.abs(wanted).max())


def test_entries_that_are_dead_stay_dead_in_every_block():
    weights, stats = large_problem()
    generator = torch.Generator().manual_seed(0)
    alive = {name: torch.rand(weight.shape, generator=generator) < 0.4 for name, weight in weights.items()}
    p = sum(weight.numel() for weight in weights.values())
    masks = chita_update(weights, stats, n_pruned=round(0.7 * p), alive=alive)
    assert sum(int(mask.sum()) for mask in masks.values()) == p - round(0.7 * p)
    assert all((masks[name] <= alive[name]).all() for name in masks)


def print_hash(threads):
    torch.set_num_threads(threads)
    weights, stats = large_problem()
    modality = {"a": "vision", "b": "text", "c": "text"}
    print(mask_hash(prune_masks(PRUNERS["chita"], weights, stats, sparsities=[0.75], modality=modality)[0]))


def test_masks_and_weights_do_not_depend_on_process_and_threads():
    hashes = []
    for threads in (1, 2, 1):
        code = f"import test_chita; test_chita.print_hash({threads})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        hashes.append(done.stdout.strip())
    assert len(hashes[0]) == 64
    assert len(set(hashes)) == 1
