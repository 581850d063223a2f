"""FusionAdapter: models whose texts look at images, with heads for matching and a text decoder (BLIP, X-VLM)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedTokenizerFast

from eval import ranks
from vlprune.models.base import Config, ModelAdapter
from vlprune.models.generation import beam_search
from vlprune.models.images import ImageInput
from vlprune.models.text import Tokens, pad, word_ids

MAX_WORDS = 40  # of any text, in words before and in pieces after tokenization; see `FusionAdapter`
ITM_EPSILON = 1e-5  # added to the probability of every negative; see `FusionAdapter`


@dataclass(frozen=True)
class TextStates:
    """Encoded texts.

    Attributes:
        tokens: the texts' tokens.
        hidden: hidden states (n, length, width) of the text encoder.
    """

    tokens: Tokens
    hidden: Tensor

    def select(self, index: Tensor) -> TextStates:
        """The texts at positions index (k,), padded to the longest of them."""
        tokens = self.tokens.select(index)
        return TextStates(tokens, self.hidden[index][:, : tokens.ids.shape[1]])

    def gathered(self) -> TextStates:
        """The texts of all ranks, padded to the longest of them."""
        length = max(ranks.listed([self.hidden.shape[1]]))
        tokens = self.tokens.widened(length)
        own = F.pad(self.hidden, (0, 0, 0, length - self.hidden.shape[1]))
        ids, attention_mask = ranks.gathered(tokens.ids), ranks.gathered(tokens.attention_mask)
        return TextStates(Tokens(ids, attention_mask), ranks.gathered(own))


class FusionAdapter(ModelAdapter):
    """A vision-language model with ITC and ITM heads and a text decoder.

    A family provides the primitives marked abstract; the losses and the tasks' interface (`eval.base`) are written here
    once. All losses and scores are those of ALBEF, BLIP and X-VLM, without momentum encoders and queues. Deviations
    from the reference, in both families: the negatives of ITM are drawn with 1e-5 added to their probability, as in
    X-VLM (BLIP adds 1e-4 in pretraining and nothing in retrieval); every text has at most 40 words and 40 tokens, as
    X-VLM's captions have (BLIP cuts at 30 tokens in pretraining and at 30 words in retrieval).

    Attributes:
        tokenizer: the tokenizer of all texts.
        label_smoothing: label smoothing of the language-model losses.
        prompt: the words that every caption begins with.
        image_width: width of the image tokens.
        text_width: width of the hidden states of texts.
        fresh_cross_attention: whether a task head has keys and values in its cross-attention that no pretrained layer
            could give, since those read tokens of another width.
    """

    image_width: int
    text_width: int

    excluded = ("vision_proj", "text_proj", "itm_head", "cls.predictions")

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, image: ImageInput, label_smoothing: float, prompt: str
    ) -> None:
        super().__init__(image)
        self.tokenizer = tokenizer
        self.label_smoothing = label_smoothing
        self.prompt = prompt
        self.fresh_cross_attention = False

    @classmethod
    def from_config(cls, config: Config, tokenizer: PreTrainedTokenizerFast) -> Self:
        """A model with fresh weights.

        Args:
            config: {"family": name, "vision": {...}, "text": {...}} in transformers' words, and further arguments of
                the class, such as "embed_dim".
            tokenizer: a WordPiece tokenizer with [CLS], [SEP] and [MASK], for BLIP with [DEC] and [ENC] too.
        """
        arguments: Any = {key: value for key, value in config.items() if key != "family"}
        make: Any = cls
        model = make(tokenizer, **arguments)
        model.config = dict(config)
        return model

    # ---- primitives of a family ----

    vision_proj: nn.Linear
    text_proj: nn.Linear
    itm_head: nn.Module
    temp: nn.Parameter

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image tokens (n, t, width) of pixels (n, 3, size, size); the first token stands for the image."""

    @abstractmethod
    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length, width) of the text alone; the first token stands for the text."""

    @abstractmethod
    def fuse(self, texts: TextStates, images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Hidden states (n, length, width) of n texts that look at n images.

        Args:
            texts: n texts.
            images: image tokens (n, t, width).
            image_mask: attention mask (n, t) bool of the image tokens; None where all of them are looked at.
        """

    @abstractmethod
    def fuse_first(self, texts: TextStates, images: Tensor) -> Tensor:
        """Hidden states (n, width) of the first token of n texts that look at images, as of `fuse` at less cost.

        It is for fine-tuning and evaluation; calibration runs `fuse`, whose layers see all tokens.

        Args:
            texts: n texts, equally many for each image, one image's after another's.
            images: image tokens (n_images, t, width).
        """

    @abstractmethod
    def decode(
        self,
        kind: Literal["caption", "answer"],
        tokens: Tokens,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Next-token logits (n, length, vocabulary) of the causal decoder.

        Args:
            kind: what is generated: a caption or an answer.
            tokens: the n texts so far, without those whose keys and values are in the cache.
            encoder_hidden_states: what the decoder looks at (n, t, width): image tokens for captions, fused states of
                questions for answers.
            encoder_attention_mask: attention mask (n, t) bool of the encoder hidden states; None where none is padding.
            cache: keys and values of the tokens before.
        """

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """The encoder's input for texts: special tokens as the family puts them, on the model's device."""

    @property
    @abstractmethod
    def start_id(self) -> int:
        """Id of the first token of what the decoder reads."""

    @property
    def end_id(self) -> int:
        """Id of the last token of what the decoder reads, [SEP]."""
        return self.token_id("[SEP]")

    def _is_fresh(self, module: str) -> bool:
        """Whether a module is the key or value of VQA's decoder that is new, since it reads texts and not images."""
        return self.fresh_cross_attention and "crossattention.self." in module and not module.endswith("query")

    def grid(self, size: int, patch: int) -> int:
        """Patches along the side of an image of a size, which the model takes from now on.

        Raises:
            ValueError: the size is no multiple of the patch size.
        """
        if size < patch or size % patch:
            raise ValueError(f"the image size must be a multiple of the patch size {patch}, got {size}")
        self.image = replace(self.image, size=size)
        if self.config:
            self.config = {**self.config, "vision": {**self.config["vision"], "image_size": size}}
        return size // patch

    def _renew_cross_attention(self, layer: nn.Module, std: float) -> None:
        """Gives a decoder layer, in place, fresh keys and values that read texts; biases stay, as in the reference."""
        attention: Any = layer.get_submodule("crossattention.self")
        for name in ("key", "value"):
            old = attention.get_submodule(name)
            fresh = nn.Linear(self.text_width, old.out_features, device=self.device)
            nn.init.normal_(fresh.weight, std=std)
            fresh.bias.data.copy_(old.bias.data)
            setattr(attention, name, fresh)

    # ---- texts ----

    def token_id(self, token: str) -> int:
        """Id of a piece of the vocabulary, such as [CLS]."""
        index = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(index, int):
            raise ValueError(f"the tokenizer has no piece {token!r}")
        return index

    def encode_texts(self, texts: Sequence[str]) -> TextStates:
        """The text encoder's states of strings."""
        tokens = self.tokenize(texts)
        return TextStates(tokens, self.encode_tokens(tokens))

    def target_tokens(self, texts: Sequence[str], prefix: str = "") -> tuple[Tokens, int]:
        """What the decoder reads for texts, and how many of its first tokens are given, not to be predicted.

        A text becomes start, prefix, pieces, end; start and prefix are given.
        """
        given = [self.start_id, *self._pieces([prefix])[0]] if prefix else [self.start_id]
        sequences = [[*given, *pieces, self.end_id] for pieces in self._pieces(texts)]
        return self._to_device(pad(sequences, self.token_id("[PAD]"))), len(given)

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return word_ids(self.tokenizer, texts, MAX_WORDS, MAX_WORDS - 2)

    def _to_device(self, tokens: Tokens) -> Tokens:
        return Tokens(tokens.ids.to(self.device), tokens.attention_mask.to(self.device))

    # ---- losses ----

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """Features of unit length (n, d) of image tokens (n, t, width)."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]), dim=-1)

    def text_features(self, hidden: Tensor) -> Tensor:
        """Features of unit length (n, d) of hidden states (n, length, width) of texts."""
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def itc_loss(self, image_features: Tensor, text_features: Tensor, positive: Tensor) -> Tensor:
        """Symmetric in-batch contrastive loss; positive (n, n) bool marks the pairs that belong together."""
        target = positive / positive.sum(1, keepdim=True)
        logits = image_features @ text_features.t() / self.temp.clamp(0.001, 0.5)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target.t())) / 2

    @torch.no_grad()
    def hard_negatives(
        self, image_features: Tensor, text_features: Tensor, positive: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """For every text a negative image (n,), for every image a negative text (n,), drawn by their similarity.

        Raises:
            RuntimeError: features are not finite.
            ValueError: a pair has no negative in the batch.
        """
        logits = image_features @ text_features.t() / self.temp.clamp(0.001, 0.5)
        if not torch.isfinite(logits).all():
            raise RuntimeError("the image or text features are not finite")
        if positive.all(1).any():
            raise ValueError(f"matching needs a negative for every pair, but a batch of {len(logits)} has none")
        drawn = []
        for similarities in (logits.t(), logits):
            weights = (similarities.softmax(1) + ITM_EPSILON).masked_fill(positive, 0.0)
            drawn.append(torch.multinomial(weights.cpu(), 1, generator=generator)[:, 0].to(self.device))
        return drawn[0], drawn[1]

    def itm_loss(
        self,
        texts: TextStates,
        images: Tensor,
        positive_hidden: Tensor,
        negatives: tuple[Tensor, Tensor],
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of match or no match over n pairs and 2n hard negatives, by `fuse`.

        Args:
            texts: n texts.
            images: tokens (n, t, width) of the images that belong to them.
            positive_hidden: the fusion (n, length, width) of these pairs.
            negatives: what `hard_negatives` returns.
            image_mask: attention mask (n, t) bool of the image tokens, or None.
        """
        own = torch.arange(len(images), device=self.device)
        negative_image, negative_text = negatives
        image_index = torch.cat([negative_image, own])
        text_index = torch.cat([own, negative_text])
        mask = None if image_mask is None else image_mask[image_index]
        negative_hidden = self.fuse(texts.select(text_index), images[image_index], mask)
        return self._match_or_not(positive_hidden[:, 0], negative_hidden[:, 0])

    def _match_or_not(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Cross-entropy over the states (n, width) and (m, width) of the first token of pairs and of negatives."""
        logits = self.itm_head(torch.cat([positive, negative]))
        target = torch.zeros(len(logits), dtype=torch.long, device=self.device)
        target[: len(positive)] = 1
        return F.cross_entropy(logits, target)

    def sequence_losses(self, logits: Tensor, tokens: Tokens, given: int) -> Tensor:
        """Label-smoothed next-token losses (n,), summed over the tokens of each text after the first `given`."""
        target = tokens.ids[:, 1:].masked_fill(~tokens.attention_mask[:, 1:], -100)
        target[:, : given - 1] = -100
        loss = F.cross_entropy(
            logits[:, :-1].transpose(1, 2),
            target,
            ignore_index=-100,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return loss.sum(1)

    def caption_loss(self, image_tokens: Tensor, captions: Sequence[str], prefix: str) -> Tensor:
        """Language-model loss of n captions of n images, averaged over the tokens that are predicted."""
        tokens, given = self.target_tokens(captions, prefix)
        logits = self.decode("caption", tokens, image_tokens, None)
        return self.sequence_losses(logits, tokens, given).sum() / tokens.attention_mask[:, given:].sum()

    # ---- the tasks' interface (eval.base.VisionLanguageModel) ----

    def tokens_of(self, images: Sequence[Image.Image]) -> Tensor:
        """Image tokens (n, t, width) of pictures."""
        return self.encode_images(self.pixels(images))

    def embed_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features of unit length (n, d) and image tokens (n, t, width) of pictures."""
        tokens = self.tokens_of(images)
        return self.image_features(tokens), tokens

    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, TextStates]:
        """Features of unit length (n, d) of texts, and the states that `match` takes."""
        states = self.encode_texts(texts)
        return self.text_features(states.hidden), states

    def match(self, image_tokens: Tensor, texts: TextStates, similarity: Tensor) -> Tensor:
        """Re-ranking scores (n,) of n pairs: the ITM logit plus the ITC similarity (n,), which is BLIP's rule.

        Equally many of the n texts belong to each of the images, one image's after another's.
        """
        return self.itm_head(self.fuse_first(texts, image_tokens))[:, 1] + similarity

    def retrieval_loss(
        self, images: Sequence[Image.Image], texts: Sequence[str], image_ids: Sequence[Any], generator: Generator
    ) -> Tensor:
        """ITC + ITM of n pairs; pairs of the same image_id are all positives; the generator draws the negatives.

        The pairs of all ranks are negatives of each other.
        """
        tokens = self.tokens_of(images)
        states = self.encode_texts(texts)
        image_features = ranks.gathered(self.image_features(tokens))
        text_features = ranks.gathered(self.text_features(states.hidden))
        share, ids = ranks.share(len(images))[0], ranks.listed(image_ids)
        positive = torch.tensor([[a == b for b in ids] for a in ids], device=self.device)
        itc = self.itc_loss(image_features, text_features, positive)
        drawn = self.hard_negatives(image_features, text_features, positive, generator)
        negative_image, negative_text = (numbers[share] for numbers in drawn)
        every_text, every_image = states.gathered(), ranks.gathered(tokens)
        # Each image with its own text and its negative one, then each text with its negative image.
        own = torch.arange(len(ids), device=self.device)[share]
        both = self.fuse_first(every_text.select(torch.stack([own, negative_text], 1).flatten()), tokens)
        other = self.fuse_first(states, every_image[negative_image])
        return itc + self._match_or_not(both[::2], torch.cat([both[1::2], other]))

    def generate(self, images: Sequence[Image.Image], *, num_beams: int, max_length: int, min_length: int) -> list[str]:
        """One caption for each picture; lengths are in tokens, prompt included."""
        image_tokens = self.tokens_of(images).repeat_interleave(num_beams, 0)
        prompt = [self.start_id, *self._pieces([self.prompt])[0]]

        def step(ids: Tensor, cache: EncoderDecoderCache) -> Tensor:
            tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
            return self.decode("caption", tokens, image_tokens, None, cache)[:, -1]

        found = beam_search(
            step,
            len(images),
            prompt,
            end=self.end_id,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            device=self.device,
        )
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]

    def captioning_loss(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Language-model loss of n captions after the prompt, averaged over the predicted tokens of all ranks."""
        tokens, given = self.target_tokens(captions, self.prompt)
        loss = self.caption_loss(self.tokens_of(images), captions, self.prompt)
        return ranks.mean_of_all(loss, int(tokens.attention_mask[:, given:].sum()), len(captions))

    def encode_questions(self, image_tokens: Tensor, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Fused hidden states (n, length, width) of n questions about n images, and their attention mask (n, length).

        Args:
            image_tokens: (n, t, width).
            questions: n questions.
        """
        states = self.encode_texts(questions)
        return self.fuse(states, image_tokens), states.tokens.attention_mask

    def rank_answers(self, images: Tensor, questions: Sequence[str], answers: Sequence[str], k: int) -> Tensor:
        """Scores (n, n_answers): minus the sequence loss of the k answers with the likeliest first token, else -inf.

        As in BLIP; X-VLM counts the first token twice.

        Args:
            images: image tokens (n, t, width).
            questions: n questions, one about each image.
            answers: the answers that all questions are ranked over.
            k: number of answers whose whole sequence is scored.
        """
        encoder_hidden_states, encoder_attention_mask = self.encode_questions(images, questions)
        candidates, _ = self.target_tokens(answers)
        ids = torch.full((len(questions), 1), self.start_id, device=self.device)
        start = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        first = self.decode("answer", start, encoder_hidden_states, encoder_attention_mask)
        first_scores = first[:, -1].log_softmax(-1)[:, candidates.ids[:, 1]]
        top = first_scores.topk(min(k, len(answers)), dim=1).indices
        asked = torch.arange(len(questions), device=self.device).repeat_interleave(top.shape[1])
        tokens = candidates.select(top.flatten())
        logits = self.decode("answer", tokens, encoder_hidden_states[asked], encoder_attention_mask[asked])
        losses = self.sequence_losses(logits, tokens, given=1)
        scores = torch.full((len(questions), len(answers)), -torch.inf, device=self.device)
        return scores.scatter(1, top, -losses.view(top.shape))

    def vqa_loss(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        weights: Sequence[Sequence[float]],
    ) -> Tensor:
        """Sum of the weighted sequence losses of each question's answers, averaged over the questions.

        Args:
            images: n pictures.
            questions: n questions, one about each picture.
            answers: the answers of each question, such as [["yes", "no"], ["red"]].
            weights: the weight of each answer, such as [[0.7, 0.3], [1.0]].
        """
        return self.answer_loss(self.tokens_of(images), questions, answers, weights)

    def answer_loss(
        self,
        image_tokens: Tensor,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        weights: Sequence[Sequence[float]],
    ) -> Tensor:
        """`vqa_loss` of questions about images that are given as image tokens (n, t, width)."""
        encoder_hidden_states, encoder_attention_mask = self.encode_questions(image_tokens, questions)
        asked = torch.tensor([i for i, options in enumerate(answers) for _ in options], device=self.device)
        tokens, given = self.target_tokens([answer for options in answers for answer in options])
        logits = self.decode("answer", tokens, encoder_hidden_states[asked], encoder_attention_mask[asked])
        flat = torch.tensor([weight for own in weights for weight in own], device=self.device)
        return (self.sequence_losses(logits, tokens, given) * flat).sum() / len(questions)
