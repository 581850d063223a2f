"""Methods against the straightforward way to compute the same, on layers of BLIP-base's shapes.

    python experiments/benchmarks/pruners.py

One thread. Writes results/benchmarks/pruners.md. Takes about two minutes and 2 GB of memory. Both ways take turns in
one process; times are of the processor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from vlprune.pruners import PRUNERS, prune_masks
from vlprune.pruners.multiflow import modality_prior
from vlprune.selection import select_many

SPARSITIES = (0.63, 0.75, 0.9)
ROUNDS = 3
# The prunable layers of one block of each of BLIP-base's stacks.
VISION = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
TEXT = [*[(768, 768)] * 12, (3072, 768), (768, 3072)]
BLOCK = 128  # columns whose entries compete in SparseGPT

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contest:
    """Two ways to compute the same.

    Attributes:
        what: what is computed, and by which other way.
        ours: computes it as vlprune does.
        theirs: computes it in the other way.
        agreement: (what ours gave, what theirs gave) -> how far they agree.
    """

    what: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    agreement: Callable[[object, object], str]


def random_layers(generator: torch.Generator) -> Tensors:
    """Normal weights, layers of different scales."""
    shapes = [*VISION, *TEXT]
    return {
        f"layer{i}": torch.empty(shape).normal_(0, 0.02 * (1 + i % 7), generator=generator)
        for i, shape in enumerate(shapes)
    }


def correlated(n_in: int, generator: torch.Generator) -> Tensor:
    """The second moments (in, in) of inputs that are correlated and not centred."""
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    inputs = torch.randn(2 * n_in, n_in, generator=generator) @ mixing + 0.5
    return inputs.T @ inputs / len(inputs)


def float_sorted_lamp(weights: Tensors) -> Tensors:
    """LAMP's scores by a stable sort of the magnitudes as floats."""
    scores = {}
    for name, weight in weights.items():
        magnitude, order = weight.flatten().abs().sort(stable=True)
        squares = magnitude.double().square()
        not_smaller = squares.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
        score = torch.empty_like(magnitude)
        score[order] = (squares / not_smaller).to(weight.dtype)
        scores[name] = score.view_as(weight)
    return scores


def sorted_wanda(weights: Tensors, input_sq: Tensors, sparsity: float) -> Tensors:
    """Wanda's masks by sorting each row of its metric, Sun et al. 2023 (arXiv:2306.11695)."""
    kept = {}
    for name, weight in weights.items():
        metric = weight.abs() * input_sq[name].sqrt()
        order = metric.sort(dim=1, stable=True).indices
        mask = torch.ones_like(weight, dtype=torch.bool)
        kept[name] = mask.scatter_(1, order[:, : int(sparsity * weight.shape[1])], 0)
    return kept


def papers_sparsegpt(weights: Tensors, outer: Tensors, sparsity: float) -> Tensors:
    """New weights by Algorithm 1 of Frantar & Alistarh 2023 (arXiv:2301.00774), in float32."""
    found = {}
    for name, weight in weights.items():
        damping = 0.01 * outer[name].diagonal().mean()
        hessian = outer[name] + damping * torch.eye(len(outer[name]))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        left = weight.clone()
        for start in range(0, weight.shape[1], BLOCK):
            span = slice(start, start + BLOCK)
            own, values = factor[span, span], left[:, span].clone()
            saliency = values.square() / own.diagonal().square()
            cut = saliency.flatten().sort().values[round(sparsity * saliency.numel()) - 1]
            pruned, errors = saliency <= cut, torch.zeros_like(values)
            for i in range(values.shape[1]):
                errors[:, i] = torch.where(pruned[:, i], values[:, i], 0.0) / own[i, i]
                values[:, i:] -= errors[:, i, None] * own[i, i:]
            left[:, span] = values.masked_fill(pruned, 0.0)
            left[:, span.stop :] -= errors @ factor[span, span.stop :]
        found[name] = left
    return found


def counted_masks(weights: Tensors, modality: dict[str, str]) -> list[dict[str, int]]:
    """MULTIFLOW's prior by making the masks of the magnitudes and counting them."""
    kept = select_many({name: weight.abs() for name, weight in weights.items()}, SPARSITIES, "modality", modality)
    return [{name: mask.numel() - int(mask.sum()) for name, mask in masks.items()} for masks in kept]


def all_equal(ours: object, theirs: object) -> str:
    """Fails where the results are not equal bit by bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    else:
        assert ours == theirs
    return "equal"


def differing(ours: object, theirs: object) -> str:
    """In how many entries the masks differ."""
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    count = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    return f"{count:,} of {sum(mask.numel() for mask in ours.values()):,} mask entries differ"


def contests() -> list[Contest]:
    """All of them, on the same weights."""
    generator = torch.Generator().manual_seed(0)
    weights = random_layers(generator)
    modality = {name: "vision" if i < len(VISION) else "text" for i, name in enumerate(weights)}
    moments = {n_in: correlated(n_in, generator) for n_in in (768, 3072)}
    outer = {name: moments[weight.shape[1]] for name, weight in weights.items()}
    inputs = {name: own.diagonal().clone() for name, own in outer.items()}

    def contest_of_sparsegpt(what: str, shape: tuple[int, int]) -> Contest:
        own = {name: weight for name, weight in weights.items() if weight.shape == shape}
        own = dict(list(own.items())[:1])
        stats = {name: {"input_outer": outer[name]} for name in own}

        def ours() -> Tensors:
            return dict(prune_masks(PRUNERS["sparsegpt"], own, stats, sparsities=[0.75], modality=modality)[0])

        def theirs() -> Tensors:
            return {name: values != 0 for name, values in papers_sparsegpt(own, outer, 0.75).items()}

        return Contest(what, ours, theirs, differing)

    def wanda() -> Tensors:
        stats = {name: {"input_sq": own} for name, own in inputs.items()}
        return dict(prune_masks(PRUNERS["wanda"], weights, stats, sparsities=[0.75], modality=modality)[0])

    lamp = PRUNERS["lamp"].score
    assert lamp is not None
    papers = "sparsegpt at 75 %, a layer of {}: the paper's algorithm in float32"
    return [
        Contest(
            "lamp, scores: a stable sort of floats",
            lambda: {name: lamp(weight, {}) for name, weight in weights.items()},
            lambda: float_sorted_lamp(weights),
            all_equal,
        ),
        Contest(
            "wanda, masks at 75 %: a sort of every row", wanda, lambda: sorted_wanda(weights, inputs, 0.75), all_equal
        ),
        *(contest_of_sparsegpt(papers.format("{} × {}".format(*shape)), shape) for shape in (*VISION[1:],)),
        Contest(
            "multiflow, counts of the prior at three sparsities: masks, counted",
            lambda: modality_prior(weights, {}, modality, SPARSITIES),
            lambda: counted_masks(weights, modality),
            all_equal,
        ),
    ]


def measured(function: Callable[[], object]) -> tuple[float, int, object]:
    """Processor seconds, peak bytes beyond what was there before, and the result."""
    ctypes.CDLL(None).malloc_trim(0)  # gives memory that is free back to the system, so that its use counts anew
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    start = time.process_time()
    result = function()
    seconds = time.process_time() - start
    return seconds, _status("VmHWM") - before, result


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def row(contest: Contest) -> str:
    """A row of the table."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    extra = {"ours": 0, "theirs": 0}
    agreement = ""
    for i in range(ROUNDS + 1):
        results = {}
        for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            took, peak, results[name] = measured(getattr(contest, name))
            seconds[name].append(took)
            extra[name] = max(extra[name], peak)
        agreement = contest.agreement(results["ours"], results["theirs"])
    ours, theirs = (own[1:] for own in seconds.values())  # the first round warms up
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    return (
        f"| {contest.what} | {median(theirs):.3f} | {median(ours):.3f} | {ratio:.1f}× "
        f"| {extra['theirs'] / 2**20:.0f} | {extra['ours'] / 2**20:.0f} | {agreement} |"
    )


def main() -> None:
    """Measures and writes the table."""
    rows = []
    for contest in contests():
        rows.append(row(contest))
        print(rows[-1], flush=True)
    n_edges = sum(out * n_in for out, n_in in (*VISION, *TEXT))
    text = [
        "# Methods",
        "",
        f"`python experiments/benchmarks/pruners.py`: torch {torch.__version__}, numpy {np.__version__}, one thread, "
        f"random weights in the shapes of a block of each of BLIP-base's stacks, {n_edges:,} entries.",
        f"Both ways take turns in one process: CPU seconds, medians of {ROUNDS} rounds and of the ratios in them; "
        "extra memory is the peak beyond what was there, the result included.",
        "",
        "| what: the other way | other (s) | vlprune (s) | faster | other (MiB) | vlprune (MiB) | agreement |",
        "|---|--:|--:|--:|--:|--:|---|",
        *rows,
        "",
    ]
    path = Path("results") / "benchmarks" / "pruners.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
