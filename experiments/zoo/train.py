"""Trains the embedded models: `python experiments/zoo/train.py tiny-xvlm` (or tiny-blip), an hour on one core.

Stage 0 teaches the vision encoder what each patch shows; stage 1 is the paper's pretraining (ITC, ITM, LM or MLM,
boxes) and, so that a fine-tuning of seconds is enough later, the losses of captioning and of question answering.
Weights are saved in float16 into the package; the log is JSON lines.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn

from vlprune.batch import Batch
from vlprune.data import scenes
from vlprune.models import build_model, save_model
from vlprune.models.fusion import FusionAdapter
from vlprune.models.text import clean
from vlprune.models.tokenizer import load_tokenizer

ZOO = Path(__file__).parents[2] / "vlprune" / "models" / "zoo"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WIDTH = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
VISION = {**WIDTH, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}
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
CONFIGS = {
    "tiny-blip": {
        "family": "blip",
        "vision": {**VISION, "layer_norm_eps": 1e-6, "initializer_range": 0.02},
        "text": {**TEXT, "num_hidden_layers": 3, "encoder_hidden_size": 128, "label_smoothing": 0.1},
        "embed_dim": 128,
        "prompt": "",
    },
    "tiny-xvlm": {
        "family": "xvlm",
        "vision": VISION,
        "text": {**TEXT, "num_hidden_layers": 4},
        "fusion_layer": 2,
        "embed_dim": 128,
        "local_attn_depth": 1,
        "prompt": "",
    },
}


@dataclass(frozen=True)
class Recipe:
    """The settings of the training that were chosen by trying."""

    seed: int = 0
    pool: int = 24_000
    patch_steps: int = 1200
    patch_batch: int = 64
    steps: int = 4000
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.02
    itm_start: float = 0.25
    questions: int = 3
    vocabulary: int = 2048


# ---- tokenizer ----


def train_tokenizer(path: Path, english: Path, size: int) -> None:
    """A WordPiece of the scenes' sentences and of everyday captions ([{captions: [{caption}]}], COCO, CC BY 4.0)."""
    own = [s for i in range(4000) if (made := scenes.train_scene(i)) for s in sentences(made)]
    others = [c["caption"] for row in json.loads(english.read_text()) for c in row["captions"]]
    trainer = BertWordPieceTokenizer(lowercase=True)
    lines = [clean(line, 40) for line in own + others]
    trainer.train_from_iterator(lines, vocab_size=size, min_frequency=2, special_tokens=SPECIAL, show_progress=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save(str(path))


def sentences(scene: scenes.Scene) -> list[str]:
    """Captions, questions and answers of a scene."""
    asked = scenes.questions(scene)
    return scenes.captions(scene) + [q for q, _, _ in asked] + [a for _, a, _ in asked]


# ---- data ----


@dataclass(frozen=True)
class Pool:
    """Scenes with their pictures, drawn once."""

    scenes: list[scenes.Scene]
    images: list[Image.Image]
    captions: list[list[str]]
    questions: list[list[tuple[str, str, str]]]

    @classmethod
    def of(cls, made: list[scenes.Scene]) -> Pool:
        """Draws and describes scenes."""
        images = [Image.fromarray(scenes.pixels(s)) for s in made]
        return cls(made, images, [scenes.captions(s) for s in made], [scenes.questions(s) for s in made])


def batches(pool: Pool, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless shuffled index batches."""
    while True:
        order = rng.permutation(len(pool.scenes))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


# ---- what each patch shows ----

ATTRIBUTES = {"shape": scenes.SHAPES, "color": tuple(scenes.COLORS), "size": tuple(scenes.RADII)}


class PatchHeads(nn.Module):
    """Linear readings of the tokens: attributes and position of each patch, background of the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v) + 1) for name, v in ATTRIBUTES.items()})
        self.position = nn.Linear(width, 16)
        self.background = nn.Linear(width, len(scenes.BACKGROUNDS))

    def loss(self, tokens: Tensor, made: list[scenes.Scene]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropies, and how often the shape of an occupied patch is right."""
        patches = tokens[:, 1:]
        total = F.cross_entropy(self.position(patches).transpose(1, 2), torch.arange(16).expand(len(made), -1))
        ground = torch.tensor([list(scenes.BACKGROUNDS).index(s.background) for s in made])
        total = total + F.cross_entropy(self.background(tokens[:, 0]), ground)
        right = torch.zeros(())
        for name, values in ATTRIBUTES.items():
            target = torch.zeros(len(made), 16, dtype=torch.long)
            for i, s in enumerate(made):
                for t in s.things:
                    target[i, 4 * t.row + t.column] = values.index(getattr(t, name)) + 1
            logits = self.heads[name](patches)
            weight = torch.ones(len(values) + 1)
            weight[0] = 0.3
            total = total + F.cross_entropy(logits.transpose(1, 2), target, weight)
            if name == "shape":
                right = (logits.argmax(-1) == target)[target > 0].float().mean()
        return total, right


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed sine and cosine codes (1 + side², width) of a grid; zeros for the class token."""
    omega = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    parts = [f(v.flatten()[:, None] * omega) for v in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, width), torch.cat(parts, 1)])


def place_positions(model: FusionAdapter) -> None:
    """Starts, in place, the position embeddings of the vision encoder from sine and cosine codes."""
    embedding = model.vision_model.embeddings.position_embedding
    target = embedding if isinstance(embedding, nn.Parameter) else embedding.weight
    with torch.no_grad():
        target.copy_(0.5 * sincos_positions(target.shape[-1], 4).view(target.shape))


# ---- training ----


def optimizer_of(modules: list[nn.Module], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, without weight decay of biases and norms."""
    parameters = [p for m in modules for p in m.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def set_lr(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int) -> None:
    """Warm-up of 100 steps, then a cosine to zero, in place."""
    factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * factor


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One clipped step, in place."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def joint_losses(
    model: FusionAdapter,
    pool: Pool,
    chosen: np.ndarray,
    rng: np.random.Generator,
    generator: torch.Generator,
    recipe: Recipe,
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of stage 1, and the image tokens they were computed from."""
    made = [pool.scenes[i] for i in chosen]
    images = [pool.images[i] for i in chosen]
    texts = [str(rng.choice(pool.captions[i])) for i in chosen]
    regions = []
    for position, s in enumerate(made):
        thing = s.things[int(rng.integers(len(s.things)))]
        regions.append((position, [v / scenes.SIZE for v in thing.box], f"a {thing.phrase}"))
    losses = model.pretraining_losses(Batch(images, texts, regions), generator)
    tokens = model.encode_images(model.pixels(images))
    if "lm" not in losses:
        losses["lm"] = model.caption_loss(tokens, texts, model.prompt)
    places, asked, answers = [], [], []
    for position, i in enumerate(chosen):
        options = pool.questions[i]
        for j in rng.permutation(len(options))[: recipe.questions]:
            places.append(position)
            asked.append(options[j][0])
            answers.append([options[j][1]])
    losses["vqa"] = model.answer_loss(tokens[torch.tensor(places)], asked, answers, [[1.0]] * len(places))
    return losses, tokens


@torch.no_grad()
def answers_right(model: FusionAdapter, pool: Pool) -> dict[str, float]:
    """Percentage of right answers by type of question."""
    answers = sorted({a for options in pool.questions for _, a, _ in options})
    right: dict[str, list[bool]] = {}
    for i in range(0, len(pool.scenes), 50):
        all_asked = [(j, q, a, k) for j in range(i, min(i + 50, len(pool.scenes))) for q, a, k in pool.questions[j]]
        tokens = model.encode_images(model.pixels(pool.images[i : i + 50]))
        picked = tokens[torch.tensor([j - i for j, *_ in all_asked])]
        best = model.rank_answers(picked, [q for _, q, _, _ in all_asked], answers, 4).argmax(1)
        for (_, _, answer, kind), b in zip(all_asked, best.tolist(), strict=True):
            right.setdefault(kind, []).append(answers[b] == answer)
    every = [v for values in right.values() for v in values]
    return {k: round(100 * float(np.mean(v)), 1) for k, v in sorted({**right, "all": every}.items())}


@torch.no_grad()
def itc_recall(model: FusionAdapter, pool: Pool) -> float:
    """Text-to-image R@1 (×100) of the first captions by ITC alone."""
    image_features, _ = model.embed_images(pool.images)
    text_features, _ = model.embed_texts([c[0] for c in pool.captions])
    best = (text_features @ image_features.t()).argmax(1)
    return round(100 * float((best == torch.arange(len(best))).float().mean()), 1)


def main(
    model_name: Annotated[str, tyro.conf.Positional],
    english: Path | None = None,
    recipe: Recipe = Recipe(),
    out: Path = ZOO,
) -> None:
    """Trains one embedded model and saves it.

    Args:
        model_name: tiny-blip or tiny-xvlm.
        english: everyday English to train a new tokenizer on (a JSON list of {captions: [{caption}]}); without it the
            tokenizer that is there is used.
        recipe: what was chosen by trying.
        out: where the model's directory is.
    """
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    directory = out / model_name
    if english is not None:
        train_tokenizer(directory / "tokenizer.json", english, recipe.vocabulary)
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    config = CONFIGS[model_name]
    config = {**config, "text": {**config["text"], "vocab_size": len(tokenizer)}}
    model = build_model(config, tokenizer)
    place_positions(model)
    pool = Pool.of([s for i in range(recipe.pool) if (s := scenes.train_scene(i))])
    val = Pool.of(scenes.split_scenes("val"))
    heads = PatchHeads(128)
    log = Path(__file__).with_name(f"{model_name}.jsonl").open("w")

    def report(**values: object) -> None:
        line = json.dumps({"seconds": round(time.perf_counter() - start), **values})
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    order = batches(pool, recipe.patch_batch, rng)
    optimizer = optimizer_of([model.vision_model, heads], recipe)
    for step in range(recipe.patch_steps):
        set_lr(optimizer, recipe, step, recipe.patch_steps)
        chosen = next(order)
        loss, right = heads.loss(
            model.encode_images(model.pixels([pool.images[i] for i in chosen])), [pool.scenes[i] for i in chosen]
        )
        update(loss, optimizer)
        if step % 100 == 99:
            report(stage=0, step=step + 1, loss=round(loss.item(), 3), shape=round(right.item(), 3))

    order = batches(pool, recipe.batch, rng)
    optimizer = optimizer_of([model, heads], recipe)
    seen: dict[str, list[float]] = {}
    for step in range(recipe.steps):
        set_lr(optimizer, recipe, step, recipe.steps)
        chosen = next(order)
        losses, tokens = joint_losses(model, pool, chosen, rng, generator, recipe)
        losses["patch"] = 0.2 * heads.loss(tokens, [pool.scenes[i] for i in chosen])[0]
        if step < recipe.itm_start * recipe.steps:
            losses.pop("itm")
        update(torch.stack(list(losses.values())).sum(), optimizer)
        for name, value in losses.items():
            seen.setdefault(name, []).append(value.item())
        if step % 100 == 99:
            report(stage=1, step=step + 1, **{name: round(float(np.mean(values)), 3) for name, values in seen.items()})
            seen.clear()
        if step % 500 == 499 or step == recipe.steps - 1:
            save_model(model, directory, torch.float16)
            report(stage=1, step=step + 1, val_itc_ir_r1=itc_recall(model, val), val_vqa=answers_right(model, val))


if __name__ == "__main__":
    tyro.cli(main)
