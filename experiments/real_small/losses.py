"""What the stages of the pretraining minimise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vlprune.models.attention import causal_bias, positions
from vlprune.models.fusion import TextStates
from vlprune.models.masked_words import mask_words
from vlprune.models.text import Tokens, pad
from vlprune.models.xvlm import XVLM

SMOOTHING = 0.1


def features_of(model: XVLM, texts: Sequence[str]) -> Tensor:
    """Unit features (n, d) of texts, encoded by length: padding costs as much as words."""
    tokens = model.tokenize(texts)
    order = tokens.valid.sum(1).argsort()
    parts = [model.text_features(model.encode_tokens(tokens.select(index))) for index in order.split(64)]
    return torch.cat(parts)[order.argsort()]


def contrastive(a: Tensor, b: Tensor, owners: tuple[Tensor, Tensor], temperature: Tensor) -> Tensor:
    """Symmetric contrastive loss of unit features (n, d) and (m, d); those of one owner are all positives."""
    positive = (owners[0][:, None] == owners[1][None]).float()
    logits = a @ b.t() / temperature.clamp(0.001, 0.5)
    forth = F.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
    back = F.cross_entropy(logits.t(), positive.t() / positive.t().sum(1, keepdim=True))
    return (forth + back) / 2


def photo_alignment(model: XVLM, image_tokens: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
    """Contrastive loss of photos with all captions of each."""
    rows = torch.arange(len(captions))
    owner = rows.repeat_interleave(torch.tensor([len(own) for own in captions]))
    texts = features_of(model, [caption for own in captions for caption in own])
    return contrastive(model.image_features(image_tokens), texts, (rows, owner), model.temp)


def text_alignment(model: XVLM, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Contrastive loss of captions with other captions of their photos."""
    owner = torch.arange(len(pairs))
    features = features_of(model, [pair[i] for i in range(2) for pair in pairs])
    return contrastive(features[: len(pairs)], features[len(pairs) :], (owner, owner), model.temp)


class Vocabulary:
    """The pieces that occur in some texts: a language-model loss over them costs a fraction of one over all.

    Attributes:
        ids: of the pieces.
        counts: of all pieces of the tokenizer, [SEP] once a text.
    """

    def __init__(self, model: XVLM, texts: Sequence[str]) -> None:
        rows = [
            piece
            for start in range(0, len(texts), 1000)
            for row in model._pieces(texts[start : start + 1000])
            for piece in [*row, model.end_id]
        ]
        self.counts = torch.bincount(torch.tensor(rows), minlength=len(model.tokenizer))
        self.ids = self.counts.nonzero()[:, 0]
        self.place = torch.full((len(self.counts),), -100)
        self.place[self.ids] = torch.arange(len(self.ids))

    def log_frequencies(self) -> Tensor:
        """Of all pieces; those that do not occur count as a tenth of one that occurs once."""
        return (self.counts.clamp(min=0.1) / self.counts.sum()).log()

    def loss(self, model: XVLM, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of hidden states (n, width) with pieces (n,)."""
        head = model.text_encoder.cls.predictions
        logits = F.linear(head.transform(hidden), head.decoder.weight[self.ids], head.decoder.bias[self.ids])
        return F.cross_entropy(logits, self.place[target], label_smoothing=SMOOTHING)


def lm_loss(
    model: XVLM,
    words: Vocabulary,
    layers: Iterable[nn.Module],
    tokens: Tokens,
    memory: Tensor,
    memory_bias: Tensor | None = None,
) -> Tensor:
    """Mean loss of a token of n texts, read by layers under a causal mask that look at memory (n, t, width)."""
    hidden = model.text_encoder.embeddings(tokens.ids, position_ids=positions(tokens, 0))
    for layer in layers:
        grounded = layer.add_cross_attention
        hidden = layer(hidden, causal_bias(tokens, 0), memory if grounded else None, memory_bias if grounded else None)
    known = tokens.valid[:, 1:]
    return words.loss(model, hidden[:, :-1][known], tokens.ids[:, 1:][known])


def caption_loss(model: XVLM, words: Vocabulary, memory: Tensor, captions: Sequence[str]) -> Tensor:
    """Language-model loss of n captions at n memories."""
    return lm_loss(model, words, model.text_encoder.layer, model.target_tokens(captions)[0], memory)


def masked_losses(
    model: XVLM, words: Vocabulary, image_tokens: Tensor, captions: Sequence[str], generator: Generator
) -> dict[str, Tensor]:
    """MLM, and cloze: the first masked word said by the answer decoder, which questions will need."""
    tokens = model.tokenize(captions)
    ids, chosen = mask_words(tokens, model.tokenizer, generator)
    masked = Tokens(ids, tokens.valid)
    hidden = model.fuse(TextStates(masked, model.encode_tokens(masked)), image_tokens)
    first = chosen.int().argmax(1)
    rows = [[model.start_id, int(row[at]), model.end_id] for row, at in zip(tokens.ids, first)]
    answers = pad(rows, model.token_id("[PAD]"))
    bias = torch.zeros(tokens.valid.shape).masked_fill(~tokens.valid, torch.finfo(torch.float32).min)[:, None, None]
    upper = model.text_encoder.layer[model.fusion_layer :]
    return {
        "mlm": words.loss(model, hidden[chosen], tokens.ids[chosen]),
        "cloze": lm_loss(model, words, upper, answers, hidden, bias),
    }


def matching_loss(model: XVLM, image_tokens: Tensor, captions: Sequence[str], generator: Generator) -> Tensor:
    """ITM of n photos with a caption each, with negatives drawn by their similarity."""
    texts = model.encode_texts(captions)
    images, features = model.image_features(image_tokens), model.text_features(texts.hidden)
    negatives = model.hard_negatives(images, features, torch.eye(len(captions), dtype=torch.bool), generator)
    return model.itm_loss(texts, image_tokens, model.fuse(texts, image_tokens), negatives)
