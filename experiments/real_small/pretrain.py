"""Pretrains an X-VLM from two encoders on a few hundred photos with captions; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import tyro
from judging import BATCH, caption_nats, itc_recalls, recalls_by_weight, tokens_of
from losses import Vocabulary, caption_loss, masked_losses, matching_loss, photo_alignment, text_alignment
from photos import augment, batches, pick, read_captions, read_photos
from PIL import Image
from torch import Generator, Tensor
from training import Log, Rates, Stage, load_finished, train

from vlprune.models import save_model
from vlprune.models.xvlm import XVLM, XVLMOptions
from vlprune.pipeline import evaluate

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """The model to pretrain, its data, and the recipe.

    Attributes:
        vision: directory of the vision encoder.
        text: directory of the text encoder.
        data: directory or name of photos with captions, with the splits train, val and test.
        captions: JSON of captions without photos, a list of {captions: [{caption}, ...]}.
        out: directory of log, checkpoints and model; an interrupted run goes on from there.
        image_size: side of the images in pixels.
        fusion_layers: number of fusion layers, which are put on top of the text encoder's layers.
        batch: photos in a step of the first stage.
        words_batch: photos in a step of the second stage; words are learned by many small steps.
        joint_batch: photos in a step of the last stage.
        texts: captions without photos in a step of the first stage; the other stages have half as many.
        epochs: number of epochs of the stages align, words and joint.
        rate: learning rate of the vision encoder's last layer in the first stage.
        text_weight: weight of the contrastive loss of captions without photos.
        averaging: share of the past in the moving average of the weights, at each step.
        seed: seed of all random choices.
    """

    vision: Path
    text: Path
    data: str
    captions: Path
    out: Path
    image_size: int = 112
    fusion_layers: int = 2
    batch: int = 64
    words_batch: int = 8
    joint_batch: int = 16
    texts: int = 64
    epochs: tuple[int, int, int] = (8, 4, 8)
    rate: float = 1e-4
    text_weight: float = 0.5
    averaging: float = 0.9
    seed: int = 0


class Pretraining:
    """The model, what it learns from, and its stages."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = XVLM.from_encoders(
            settings.vision,
            settings.text,
            fusion_layers=settings.fusion_layers,
            fusion="top",
            image_size=settings.image_size,
            prompt="",
        )
        self.photos, self.val = (read_photos(settings.data, split) for split in ("train", "val"))
        self.texts = read_captions(settings.captions)
        own = [caption for captions in [*self.photos.captions, *self.texts] for caption in captions]
        self.vocabulary = Vocabulary(self.model, own)

    @torch.no_grad()
    def start(self) -> None:
        """Gives projections and the head of words, in place, what a regression and counting find.

        Text features become the principal components of the class token, image features what a ridge regression from
        the image's class token to the mean of its captions' features says; words are as likely as they are frequent.
        """
        model, hidden = self.model, self._class_tokens()
        mean = hidden.mean(0)
        directions = torch.linalg.svd(hidden - mean, full_matrices=False)[2][: model.text_proj.out_features]
        model.text_proj.weight.copy_(directions)
        model.text_proj.bias.copy_(-directions @ mean)
        owner = torch.tensor(self.photos.owners)
        target = torch.zeros(len(self.photos.ids), len(directions)).index_add_(0, owner, model.text_proj(hidden))
        found = ridge(tokens_of(model, self.photos.images)[:, 0], target / owner.bincount()[:, None], 0.3)
        model.vision_proj.weight.copy_(found[:-1].t())
        model.vision_proj.bias.copy_(found[-1])
        model.text_encoder.cls.predictions.decoder.bias.copy_(self.vocabulary.log_frequencies())

    # ---- the stages ----

    def align(self) -> Stage:
        """Both encoders end to end, by contrast of photos with their captions and of captions with each other."""
        settings, rate = self.settings, self.settings.rate

        def losses(chosen: list[int], generator: Generator) -> Losses:
            itc = photo_alignment(self.model, self._crops(chosen, generator), self._captions(chosen))
            texts = text_alignment(self.model, self._pairs(settings.texts, generator))
            return {"itc": itc, "texts": settings.text_weight * texts}

        rates = Rates(vision=rate, text=rate / 2, projections=5 * rate)
        return Stage("align", settings.epochs[0], rates, self._epoch(settings.batch), losses, self._judge_features)

    def words(self) -> Stage:
        """Fusion layers and heads while the encoders rest, on photos and on captions in the place of photos."""
        settings, model, words, rate = self.settings, self.model, self.vocabulary, self.settings.rate
        imagination = self._imagination()

        def losses(chosen: list[int], generator: Generator) -> Losses:
            tokens = self._views_of(chosen, generator)
            captions, others = (pick(self._captions(chosen), generator) for _ in range(2))
            found = {
                "lm": caption_loss(model, words, tokens, captions),
                "imagined": self._imagined(imagination, settings.texts // 2, generator),
            }
            found |= masked_losses(model, words, tokens, others, generator)
            return {**found, "itm": matching_loss(model, tokens, captions, generator)}

        rates = Rates(fusion=5 * rate, heads=10 * rate)
        return Stage("words", settings.epochs[1], rates, self._epoch(settings.words_batch), losses, self._judge)

    def joint(self) -> Stage:
        """Everything but the vision encoder: contrast, matching, masked words, captions."""
        settings, model, words, rate = self.settings, self.model, self.vocabulary, self.settings.rate
        imagination = self._imagination()

        def losses(chosen: list[int], generator: Generator) -> Losses:
            tokens, captions = self._views_of(chosen, generator), self._captions(chosen)
            two = [list(pair) for pair in zip(pick(captions, generator), pick(captions, generator))]
            found = {
                "itc": photo_alignment(model, tokens, two),
                "texts": settings.text_weight * text_alignment(model, self._pairs(settings.texts // 4, generator)),
                "lm": caption_loss(model, words, tokens, pick(captions, generator)),
                "imagined": self._imagined(imagination, settings.texts // 2, generator),
            }
            found |= masked_losses(model, words, tokens, pick(captions, generator), generator)
            return {**found, "itm": matching_loss(model, tokens, pick(captions, generator), generator)}

        rates = Rates(text=1.5 * rate, words=rate / 2, fusion=5 * rate, projections=rate, heads=10 * rate)
        return Stage("joint", settings.epochs[2], rates, self._epoch(settings.joint_batch), losses, self._judge)

    # ---- what the stages learn from ----

    def _epoch(self, size: int) -> Callable[[Generator], list[list[int]]]:
        return lambda generator: batches(len(self.photos.ids), size, generator)

    def _captions(self, chosen: list[int]) -> list[list[str]]:
        return [self.photos.captions[i] for i in chosen]

    def _crops(self, chosen: list[int], generator: Generator) -> Tensor:
        """Image tokens of random crops."""
        images = [augment(self.photos.images[i], self.settings.image_size, generator) for i in chosen]
        return self.model.encode_images(self.model.pixels(images))

    @cached_property
    def _views(self) -> Tensor:
        """Image tokens (2, n, t, width) of the photos as they are and mirrored, while the vision encoder rests."""
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in self.photos.images]
        return torch.stack([tokens_of(self.model, images) for images in (self.photos.images, mirrored)])

    def _views_of(self, chosen: list[int], generator: Generator) -> Tensor:
        return self._views[torch.randint(2, (len(chosen),), generator=generator), torch.tensor(chosen)]

    def _pairs(self, size: int, generator: Generator) -> list[tuple[str, str]]:
        """Two captions each of photos that are not there."""
        found = []
        for i in torch.randint(len(self.texts), (size,), generator=generator).tolist():
            first, second = torch.randperm(len(self.texts[i]), generator=generator)[:2].tolist()
            found.append((self.texts[i][first], self.texts[i][second]))
        return found

    def _class_tokens(self) -> Tensor:
        """The class tokens (n, width) of the photos' captions."""
        model, texts = self.model, self.photos.texts
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return torch.cat([model.encode_texts(part).hidden[:, 0] for part in parts])

    @torch.no_grad()
    def _imagination(self) -> Tensor:
        """Ridge regression (text width + 1, 2 · width) from a caption to its photo (class token, mean patch)."""
        tokens = self._views[0]
        target = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        return ridge(self._class_tokens(), target[torch.tensor(self.photos.owners)], 0.1)

    def _imagined(self, imagination: Tensor, size: int, generator: Generator) -> Tensor:
        """Language-model loss of captions without photos, at the photos that other captions of theirs make one see."""
        pairs = self._pairs(size, generator)
        with torch.no_grad():
            hidden = self.model.encode_texts([first for first, _ in pairs]).hidden[:, 0]
            imagined = (hidden @ imagination[:-1] + imagination[-1]).view(len(pairs), 2, -1)
        return caption_loss(self.model, self.vocabulary, imagined, [second for _, second in pairs])

    # ---- how good it is ----

    def _judge_features(self) -> dict[str, float]:
        found = itc_recalls(self.model, self.val)
        return {**found, "score": found["r_mean"]}

    def _judge(self) -> dict[str, float]:
        """Recalls and the loss of captions, a tenth of which counts as much as a point of recall."""
        found, nats = itc_recalls(self.model, self.val), caption_nats(self.model, self.vocabulary, self.val)
        return {**found, "val_lm": nats, "score": found["r_mean"] - 10 * nats}


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Weights (width + 1, out), the last the constant; strength is relative to the mean variance of x (n, width)."""
    mean, target = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.t() @ centred
    gram = gram + strength * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, centred.t() @ (y - target))
    return torch.cat([weight, (target - mean @ weight)[None]])


def main(settings: Settings) -> None:
    """Runs the stages, chooses the weight of ITC in ranking on val, saves the model and reports test."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    log, run = Log(settings.out / "log.jsonl"), Pretraining(settings)
    model = run.model
    run.start()
    log(stage="start", **itc_recalls(model, run.val))
    for make in (run.align, run.words, run.joint):
        if not load_finished(model, settings.out, make.__name__):
            train(model, make(), seed=settings.seed, averaging=settings.averaging, out=settings.out, log=log)
    by_weight = recalls_by_weight(model, run.val)
    weight = max(by_weight, key=lambda key: by_weight[key])
    log(stage="ranking", itc_weight=weight, **{f"val_{key:g}": value for key, value in by_weight.items()})
    model.apply_options(XVLMOptions(itc_weight=weight))
    save_model(model, settings.out / "model")
    itc = itc_recalls(model, read_photos(settings.data, "test"))
    log(stage="test", by="itc", **itc)
    for task, options in (("retrieval", {}), ("captioning", {"max_length": 20})):
        log(stage="test", task=task, **evaluate(model, task, settings.data, options=options))


if __name__ == "__main__":
    main(tyro.cli(Settings))
