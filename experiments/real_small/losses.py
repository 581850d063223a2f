"""The losses that the stages of the pretraining minimise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vlprune.models.attention import additive_mask, causal_mask, positions
from vlprune.models.fusion import TextStates
from vlprune.models.text import Tokens, pad
from vlprune.models.xvlm import XVLM
from vlprune.models.xvlm.masked_words import mask_words

SMOOTHING = 0.1  # label smoothing of the language-model losses


def features_of(model: XVLM, texts: Sequence[str]) -> Tensor:
    """Features of unit length (n, d) of texts, which are encoded by length, so that there is little padding."""
    tokens = model.tokenize(texts)
    order = tokens.attention_mask.sum(1).argsort()
    parts = [model.text_features(model.encode_tokens(tokens.select(index))) for index in order.split(64)]
    return torch.cat(parts)[order.argsort()]


def contrastive(a: Tensor, b: Tensor, owners: tuple[Tensor, Tensor], temperature: Tensor) -> Tensor:
    """Symmetric contrastive loss of features of unit length; those of one owner are all positives.

    Args:
        a: (n, d).
        b: (m, d).
        owners: the number of the owner of each of a (n,) and of each of b (m,), such as [0, 1] and [0, 0, 1, 1].
        temperature: scalar that similarities are divided by.
    """
    positive = (owners[0][:, None] == owners[1][None]).float()
    logits = a @ b.t() / temperature.clamp(0.001, 0.5)
    forth = F.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
    back = F.cross_entropy(logits.t(), positive.t() / positive.t().sum(1, keepdim=True))
    return (forth + back) / 2


def photo_alignment(model: XVLM, image_tokens: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
    """Contrastive loss of photos with all of their captions."""
    photos = torch.arange(len(captions))
    owner = photos.repeat_interleave(torch.tensor([len(own) for own in captions]))
    texts = features_of(model, [caption for own in captions for caption in own])
    return contrastive(model.image_features(image_tokens), texts, (photos, owner), model.temp)


def text_alignment(model: XVLM, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Contrastive loss of captions with other captions of their photos."""
    owner = torch.arange(len(pairs))
    features = features_of(model, [pair[i] for i in range(2) for pair in pairs])
    return contrastive(features[: len(pairs)], features[len(pairs) :], (owner, owner), model.temp)


class Vocabulary:
    """The pieces that occur in some texts: a language-model loss over them costs a fraction of one over all.

    Attributes:
        ids: ids of the pieces that occur.
        counts: how often each piece of the tokenizer occurs, with one [SEP] for each text.
    """

    def __init__(self, model: XVLM, texts: Sequence[str]) -> None:
        pieces = [
            piece
            for start in range(0, len(texts), 1000)
            for text in model._pieces(texts[start : start + 1000])
            for piece in [*text, model.end_id]
        ]
        self.counts = torch.bincount(torch.tensor(pieces), minlength=len(model.tokenizer))
        self.ids = self.counts.nonzero()[:, 0]
        self.place = torch.full((len(self.counts),), -100)
        self.place[self.ids] = torch.arange(len(self.ids))

    def log_frequencies(self) -> Tensor:
        """Logarithm of each piece's frequency; one that does not occur counts as a tenth of one that occurs once."""
        return (self.counts.clamp(min=0.1) / self.counts.sum()).log()

    def loss(self, model: XVLM, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the pieces (n,) that hidden states (n, width) are to predict."""
        head = model.text_encoder.cls.predictions
        logits = F.linear(head.transform(hidden), head.decoder.weight[self.ids], head.decoder.bias[self.ids])
        return F.cross_entropy(logits, self.place[target], label_smoothing=SMOOTHING)


def lm_loss(
    model: XVLM,
    words: Vocabulary,
    layers: Iterable[nn.Module],
    tokens: Tokens,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Language-model loss of n texts, averaged over their tokens.

    Args:
        model: gives embeddings and the head of words.
        words: the vocabulary that the loss is over.
        layers: text layers, which run under a causal mask.
        tokens: the texts.
        encoder_hidden_states: what the layers look at (n, t, width).
        encoder_attention_mask: its attention mask (n, t) bool, None where none is padding.
    """
    hidden = model.decoder_states(
        layers,
        tokens.ids,
        positions(tokens, 0),
        causal_mask(tokens, 0),
        encoder_hidden_states,
        additive_mask(encoder_attention_mask),
    )
    known = tokens.attention_mask[:, 1:]
    return words.loss(model, hidden[:, :-1][known], tokens.ids[:, 1:][known])


def caption_loss(model: XVLM, words: Vocabulary, image_tokens: Tensor, captions: Sequence[str]) -> Tensor:
    """Language-model loss of n captions of images that are given as tokens (n, t, width)."""
    return lm_loss(model, words, model.text_encoder.layer, model.target_tokens(captions)[0], image_tokens)


def masked_losses(
    model: XVLM, words: Vocabulary, image_tokens: Tensor, captions: Sequence[str], generator: Generator
) -> dict[str, Tensor]:
    """MLM, and cloze: the answer decoder, which questions will need, says the first masked word."""
    tokens = model.tokenize(captions)
    ids, chosen = mask_words(tokens, model.tokenizer, generator)
    masked = Tokens(ids, tokens.attention_mask)
    hidden = model.fuse(TextStates(masked, model.encode_tokens(masked)), image_tokens)
    first = chosen.int().argmax(1)
    said = [[model.start_id, int(own[place]), model.end_id] for own, place in zip(tokens.ids, first)]
    answers = pad(said, model.token_id("[PAD]"))
    upper = model.text_encoder.layer[model.fusion_layer :]
    return {
        "mlm": words.loss(model, hidden[chosen], tokens.ids[chosen]),
        "cloze": lm_loss(model, words, upper, answers, hidden, tokens.attention_mask),
    }


def matching_loss(model: XVLM, image_tokens: Tensor, captions: Sequence[str], generator: Generator) -> Tensor:
    """ITM of n photos with one caption each; negatives are drawn by their similarity."""
    texts = model.encode_texts(captions)
    images, features = model.image_features(image_tokens), model.text_features(texts.hidden)
    negatives = model.hard_negatives(images, features, torch.eye(len(captions), dtype=torch.bool), generator)
    return model.itm_loss(texts, image_tokens, model.fuse(texts, image_tokens), negatives)
