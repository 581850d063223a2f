"""Fixtures that several test files share: one thread, small random models, a small data set on disk."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

# Every call of these modules is checked against the shapes in its annotations; hence before anything imports them.
CHECKED = ("vlprune.selection", "vlprune.masks", "vlprune.pruners", "eval")
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

from vlprune.batch import Batch
from vlprune.models import ZOO, build_model
from vlprune.models.base import ModelAdapter
from vlprune.models.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
VISION = {**WIDTH, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
TEXT = {
    **WIDTH,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "sep_token_id": 3,
    "eos_token_id": 3,
}
SMALL = {
    "blip": {
        "family": "blip",
        "vision": {**VISION, "initializer_range": 0.02},
        "text": {**TEXT, "num_hidden_layers": 2, "encoder_hidden_size": 32, "label_smoothing": 0.1},
        "embed_dim": 16,
    },
    "xvlm": {
        "family": "xvlm",
        "vision": VISION,
        "text": {**TEXT, "num_hidden_layers": 3},
        "fusion_layer": 1,
        "embed_dim": 16,
        "local_attn_depth": 1,
    },
}
CAPTIONS = ("a red circle", "two blue rings on gray", "a dog", "a man riding a horse on the beach near a dog", "a cat")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def shared():
    """The folder of reference vectors and real data beside the project; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED}")
    return SHARED


def small_model(family: str) -> ModelAdapter:
    """A small random model of a family, the same every time."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ZOO / "tiny-blip" / "tokenizer.json")
    config = SMALL[family]
    return build_model({**config, "text": {**config["text"], "vocab_size": len(tokenizer)}}, tokenizer).eval()


@pytest.fixture(params=sorted(SMALL))
def model(request):
    """Each family in turn."""
    return small_model(request.param)


def noise_image(seed: int, size: int = 32) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture
def batch():
    """Five pairs with texts of different lengths, and three regions."""
    regions = [
        (0, [0.1, 0.1, 0.3, 0.3], "a red thing"),
        (2, [0.5, 0.0, 0.5, 1.0], "dog"),
        (4, [0.0, 0.6, 0.2, 0.2], "cat"),
    ]
    return Batch([noise_image(i) for i in range(5)], CAPTIONS, regions)


@pytest.fixture
def dataset(tmp_path):
    """A directory in the Karpathy and VQA v2 layouts: 12 training, 4 val and 6 test images."""
    return write_dataset(tmp_path / "data")


def write_dataset(root: Path) -> Path:
    """Writes the small data set."""
    (root / "images").mkdir(parents=True)
    rows, number = [], 0
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        asked, answered = [], []
        for _ in range(count):
            number += 1
            noise_image(number).save(root / "images" / f"{number:04d}.png")
            sentences = [{"raw": f"{caption} number {number}"} for caption in CAPTIONS]
            rows.append({"filename": f"{number:04d}.png", "imgid": number, "split": split, "sentences": sentences})
            asked.append({"question_id": number, "image_id": number, "question": "is it a dog?"})
            answer = "yes" if number % 2 else "no"
            answered.append({"question_id": number, "image_id": number, "answers": [{"answer": answer}] * 10})
        (root / f"{split}_questions.json").write_text(json.dumps({"questions": asked}))
        (root / f"{split}_annotations.json").write_text(json.dumps({"annotations": answered}))
    (root / "dataset_small.json").write_text(json.dumps({"images": rows}))
    return root


@pytest.fixture
def own_caches(tmp_path, monkeypatch):
    """Caches of this project and of `datasets` that nothing else uses."""
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def scenes_cache(tmp_path_factory):
    """The embedded data set in a cache of its own, made once for all tests."""
    root = tmp_path_factory.mktemp("cache")
    before = os.environ.get("VLPRUNE_CACHE")
    os.environ["VLPRUNE_CACHE"] = str(root)
    yield root
    if before is None:
        del os.environ["VLPRUNE_CACHE"]
    else:
        os.environ["VLPRUNE_CACHE"] = before
