"""What a masked training step costs over a dense one, and what matching costs over the straightforward computation.

    python experiments/benchmarks/training.py

One thread. Writes results/benchmarks/training.md. Takes about ten minutes and 2 GB of memory.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from eval import TASKS, retrieval
from eval.retrieval import RetrievalOptions
from vlprune import apply_masks, compute_masks
from vlprune.config import FinetuningConfig
from vlprune.data import load_pairs, load_questions
from vlprune.finetune.loop import finetune
from vlprune.masks import Masks
from vlprune.models import find_model, load_model
from vlprune.models.blip import BLIP
from vlprune.models.fusion import FusionAdapter, TextStates
from vlprune.models.tokenizer import load_tokenizer

MODELS = ("tiny-xvlm", "tiny-blip")
STEPS = 42
CONFIG = FinetuningConfig(steps=STEPS, batch_size=32, lr=5e-4)  # that of the quickstart, but for the steps
SPARSITY = 0.75
IMAGES = 60  # test images of the retrieval
PIECES = 12  # tokens of a text at BLIP-base size


def in_turns(contenders: dict[str, Callable[[], list[float]]], turns: int) -> dict[str, list[list[float]]]:
    """{name: for each turn what its call measured}, after one turn to warm up."""
    found: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, measure in contenders.items():
            measured = measure()
            if turn:
                found[name].append(measured)
    return found


# ---- a training step ----


class Turns:
    """Threads that go on one at a time, one after the other, so that what they do is measured side by side."""

    def __init__(self, number: int) -> None:
        self._order = deque(range(number))
        self._changed = threading.Condition()

    def wait(self, place: int) -> None:
        """Returns when it is the turn of the thread of this number."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == place)

    def hand_on(self) -> None:
        """Gives the turn to the next thread."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()

    def leave(self) -> None:
        """Gives the turn to the next thread for good."""
        with self._changed:
            self._order.popleft()
            self._changed.notify_all()


def steps(name: str, task: str, sparsity: float, turns: Turns, place: int) -> list[float]:
    """CPU seconds of each step but the first of fine-tuning a model, dense where the sparsity is 0.

    After each step the other threads have their turns.
    """
    clock: list[tuple[float, float]] = []

    def tell(*_: object) -> None:
        ended = time.thread_time()
        turns.hand_on()
        turns.wait(place)
        clock.append((ended, time.thread_time()))

    turns.wait(place)
    try:
        model: Any = load_model(name)
        masks = Masks({})
        if sparsity:
            masks = compute_masks(model, "omp", sparsity)
            apply_masks(model, masks)
        model.add_task_head(task)
        load = load_questions if TASKS[task].examples == "questions" else load_pairs
        data = load("scenes", "train", limit=256)
        torch.manual_seed(0)
        finetune(model, masks, model.layer_of, data, TASKS[task].loss, CONFIG, 0, tell=tell)  # pyright: ignore[reportArgumentType]
    finally:
        turns.leave()
    return [ended - began for (_, began), (ended, _) in pairwise(clock)][1:]


def step_rows() -> list[str]:
    """A row for each model and task: dense, masked, and dense once more, which shows how well a ratio is measured."""
    rows = []
    for name in MODELS:
        for task in TASKS:
            contenders = (0.0, SPARSITY, 0.0)
            turns = Turns(len(contenders))
            with ThreadPoolExecutor(len(contenders)) as pool:
                running = [pool.submit(steps, name, task, own, turns, n) for n, own in enumerate(contenders)]
                dense, masked, again = (each.result() for each in running)
            ratio, control = (median(a / b for a, b in zip(own, dense, strict=True)) for own in (masked, again))
            times = " | ".join(f"{1e3 * median(own):.1f}" for own in (dense, masked))
            rows.append(f"| {name} | {task} | {times} | {ratio:.3f} | {control:.3f} |")
            print(rows[-1], flush=True)
    return rows


# ---- matching ----


def each_pair_whole(model: FusionAdapter) -> Callable[[TextStates, Tensor], Tensor]:
    """The straightforward computation: all tokens through all layers, every pair by itself."""

    def fuse_first(texts: TextStates, images: Tensor) -> Tensor:
        return model.fuse(texts, images.repeat_interleave(len(texts.hidden) // len(images), 0))[:, 0]

    return fuse_first


def each_pair(model: FusionAdapter) -> Callable[[TextStates, Tensor], Tensor]:
    """The last layer for the first token alone, every pair by itself."""
    ours = model.fuse_first

    def fuse_first(texts: TextStates, images: Tensor) -> Tensor:
        return ours(texts, images.repeat_interleave(len(texts.hidden) // len(images), 0))

    return fuse_first


WAYS: dict[str, Callable[[FusionAdapter], Callable[[TextStates, Tensor], Tensor]]] = {
    "all tokens, every pair by itself": each_pair_whole,
    "first token alone, every pair by itself": each_pair,
    "first token alone, keys and values once an image": lambda model: model.fuse_first,
}


def timed(make: Callable[[], Any], kept: list[Any]) -> list[float]:
    """CPU seconds of a call, whose result is put into a list."""
    start = time.process_time()
    result = make()
    seconds = time.process_time() - start
    kept[:] = [result]
    return [seconds]


def evaluation_rows() -> list[str]:
    """Retrieval on images of the embedded scenes, for each model and way."""
    rows = []
    data = load_pairs("scenes", "test", limit=IMAGES)
    for name in MODELS:
        model: Any = load_model(name)
        said: dict[str, list[Any]] = {way: [] for way in WAYS}

        def predict(way: str, model: Any = model, said: dict[str, list[Any]] = said) -> list[float]:
            model.fuse_first = WAYS[way](model)
            try:
                return timed(lambda: retrieval.predict(model, data, RetrievalOptions(10)), said[way])  # pyright: ignore[reportArgumentType]
            finally:
                del model.fuse_first

        found = in_turns({way: lambda way=way: predict(way) for way in WAYS}, 2)
        plain = said["all tokens, every pair by itself"][0]
        for way, own in found.items():
            equal = sum(a == b for a, b in zip(plain, said[way][0], strict=True))
            rows.append(_row(f"{name}, {IMAGES} images", way, own, found, f"{equal} of {len(plain)} rankings equal"))
    return rows


def blip_base() -> BLIP:
    """A random model of BLIP-base's size at 384 pixels, on the vocabulary of tiny-blip."""
    tokenizer = load_tokenizer(find_model("tiny-blip") / "tokenizer.json")
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 768, "pad_token_id": 0, "is_decoder": True}
    ends = {"bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]")}
    vision = {**width, "image_size": 384, "patch_size": 16, "initializer_range": 0.02}
    return BLIP(tokenizer, vision, {**width, **text, **ends}).eval()


@torch.inference_mode()
def base_rows() -> list[str]:
    """Matching an image with 8 texts at BLIP-base size."""
    model = blip_base()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 577, 768, generator=generator)
    states = model.encode_texts([" ".join(["red"] * (PIECES - 2))] * 8)
    said: dict[str, list[Any]] = {way: [] for way in WAYS}
    found = in_turns(
        {way: lambda way=way: timed(lambda: WAYS[way](model)(states, images), said[way]) for way in WAYS}, 3
    )
    plain = said["all tokens, every pair by itself"][0]
    return [
        _row("BLIP-base size, an image with 8 texts", way, own, found, f"{(said[way][0] - plain).abs().max():.1e}")
        for way, own in found.items()
    ]


def _row(what: str, way: str, own: list[list[float]], found: dict[str, list[list[float]]], same: str) -> str:
    plain = found["all tokens, every pair by itself"]
    faster = median(a[0] / b[0] for a, b in zip(plain, own, strict=True))
    row = f"| {what} | {way} | {median(turn[0] for turn in own):.2f} | {faster:.2f} × | {same} |"
    print(row, flush=True)
    return row


def peak() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Measures and writes the tables."""
    training, small = step_rows(), evaluation_rows()
    before = peak()
    text = [
        "# Training steps and matching",
        "",
        f"`python experiments/benchmarks/training.py`: torch {torch.__version__}, transformers "
        f"{transformers.__version__}, one thread. Contenders take turns;",
        "times are those of the processor, medians; ratios and `faster` are medians of the ratios of neighbours.",
        "",
        f"A step of fine-tuning on {CONFIG.batch_size} examples of the scenes, dense and masked at {SPARSITY:.0%}, of",
        f"{STEPS - 2} steps. A dense, a masked and a second dense training take turns, a step each; the last column",
        "says how far a ratio is off by chance:",
        "",
        "| model | task | dense (ms) | masked (ms) | masked / dense | second dense / dense |",
        "|---|---|--:|--:|--:|--:|",
        *training,
        "",
        "Image-text matching: the evaluation of retrieval, with everything else that belongs to it, and the fusion of "
        "texts with images alone, against all tokens of all layers:",
        "",
        "| | computed | CPU seconds | faster | against the first line |",
        "|---|---|--:|--:|--:|",
        *small,
        *base_rows(),
        "",
        f"Peak memory of the process: {before:.0f} MiB before the model of BLIP-base's size, {peak():.0f} MiB with it.",
        "",
    ]
    path = Path("results") / "benchmarks" / "training.md"
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
