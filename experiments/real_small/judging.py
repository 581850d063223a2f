"""What a pretraining is judged by, on photos that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from losses import Vocabulary, caption_loss, features_of
from photos import Photos
from PIL import Image
from torch import Tensor

from eval.retrieval import recalls
from vlprune.models.xvlm import XVLM

BATCH = 64  # photos or texts at a time
CANDIDATES = 16
WEIGHTS = (0.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)  # of ITC beside ITM


@torch.no_grad()
def tokens_of(model: XVLM, images: Sequence[Image.Image]) -> Tensor:
    """Image tokens (n, t, width)."""
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return torch.cat([model.encode_images(model.pixels(part)) for part in parts])


@torch.no_grad()
def itc_recalls(model: XVLM, photos: Photos) -> dict[str, float]:
    """R@1 both ways and the mean of the six recalls, by ITC alone."""
    images = model.image_features(tokens_of(model, photos.images))
    scores = images @ features_of(model, photos.texts).t()
    found = recalls(scores, scores.t(), photos.owners)
    return {key: found[key] for key in ("tr_r1", "ir_r1", "r_mean")}


@torch.no_grad()
def caption_nats(model: XVLM, words: Vocabulary, photos: Photos) -> float:
    """Language-model loss of the first captions, a token."""
    tokens, first = tokens_of(model, photos.images), [own[0] for own in photos.captions]
    return caption_loss(model, words, tokens, first).item()


@torch.no_grad()
def recalls_by_weight(model: XVLM, photos: Photos) -> dict[float, float]:
    """{weight of ITC: mean of the six recalls} of the nearest candidates ranked by ITM + weight · ITC."""
    tokens, texts = tokens_of(model, photos.images), photos.texts
    similarity = model.image_features(tokens) @ features_of(model, texts).t()
    candidate = torch.zeros_like(similarity, dtype=torch.bool)
    candidate.scatter_(1, similarity.topk(CANDIDATES, dim=1).indices, True)
    candidate.t().scatter_(1, similarity.t().topk(CANDIDATES, dim=1).indices, True)
    logits = torch.zeros_like(similarity)
    for start in range(0, len(texts), BATCH):
        states = model.encode_texts(texts[start : start + BATCH])
        for pairs in candidate[:, start : start + BATCH].nonzero().split(256):
            image, text = pairs.t()
            hidden = model.fuse(states.select(text), tokens[image])
            logits[image, start + text] = model.itm_head(hidden[:, 0])[:, 1]
    found = {}
    for weight in WEIGHTS:
        scores = (logits + weight * similarity).masked_fill(~candidate, -1e4)
        found[weight] = recalls(scores, scores.t(), photos.owners)["r_mean"]
    return found
