"""BLIP (Li et al. 2022, arXiv:2201.12086) on transformers' BLIP modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, EncoderDecoderCache, PreTrainedTokenizerFast
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from vlprune.batch import Batch
from vlprune.models.base import Config, ModelAdapter, TextStates, attention_bias, causal_bias, positions
from vlprune.models.text import Tokens, pad

TIED = ("embeddings", "crossattention", "intermediate", "output")


class BLIP(ModelAdapter):
    """A ViT, and one text transformer in three roles: unimodal encoder, image-grounded encoder, image-grounded decoder.

    Encoder and decoder share everything except self-attention, as whole modules. Deviations from the paper: ITC
    within the batch, without momentum encoders and queue.
    """

    family = "blip"
    uses_regions = False
    scored_losses = ("itc", "itm", "lm")

    def __init__(
        self,
        vision: BlipVisionConfig,
        text: BlipTextConfig,
        tokenizer: PreTrainedTokenizerFast,
        embed_dim: int = 256,
        prompt: str = "a picture of ",
    ) -> None:
        super().__init__(tokenizer, vision.image_size, text.label_smoothing, prompt)
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text)
        self.vision_proj = nn.Linear(vision.hidden_size, embed_dim)
        self.text_proj = nn.Linear(text.hidden_size, embed_dim)
        self.itm_head = nn.Linear(text.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.tie()

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerFast, vision: Config, text: Config, **arguments: Any) -> BLIP:
        """Fresh weights; transformers' BLIP modules have eager attention only."""
        eager: Config = {"attn_implementation": "eager"}
        return cls(BlipVisionConfig(**vision, **eager), BlipTextConfig(**text, **eager), tokenizer, **arguments)

    def tie(self) -> None:
        """Makes encoder and decoder share, in place, all modules except self-attention."""
        decoder = self.text_decoder.bert
        decoder.embeddings = self.text_encoder.embeddings
        for own, shared in zip(decoder.encoder.layer, self.text_encoder.encoder.layer, strict=True):
            for name in TIED[1:]:
                setattr(own, name, getattr(shared, name))
        self._tie_head()

    def _tie_head(self) -> None:
        predictions = self.text_decoder.cls.predictions
        predictions.decoder.weight = self.text_decoder.bert.embeddings.word_embeddings.weight
        predictions.bias = predictions.decoder.bias

    # ---- primitives ----

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image tokens (n, t, width)."""
        return self.vision_model(pixels).last_hidden_state

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Hidden states of the unimodal encoder."""
        hidden, bias = self.text_encoder.embeddings(tokens.ids), attention_bias(tokens.valid)
        for layer in self.text_encoder.encoder.layer:
            hidden = _layer(layer, hidden, bias)
        return hidden

    def fuse(self, texts: TextStates, images: Tensor, image_valid: Tensor | None = None) -> Tensor:
        """Hidden states of the image-grounded encoder, which reads the text anew after the token [ENC]."""
        ids = texts.tokens.ids.clone()
        ids[:, 0] = self.token_id("[ENC]")
        hidden, bias = self.text_encoder.embeddings(ids), attention_bias(texts.tokens.valid)
        image_bias = attention_bias(image_valid)
        for layer in self.text_encoder.encoder.layer:
            hidden = _layer(layer, hidden, bias, images, image_bias)
        return hidden

    def decode(
        self,
        kind: Literal["caption", "answer"],  # noqa: ARG002 - one decoder serves both
        tokens: Tokens,
        memory: Tensor,
        memory_valid: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Next-token logits."""
        past = cache.get_seq_length() if cache is not None else 0
        hidden = self.text_decoder.bert.embeddings(tokens.ids, position_ids=positions(tokens, past))
        bias, memory_bias = causal_bias(tokens, past), attention_bias(memory_valid)
        for layer in self.text_decoder.bert.encoder.layer:
            hidden = _layer(layer, hidden, bias, memory, memory_bias, cache)
        return self.text_decoder.cls(hidden)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """[CLS] pieces [SEP]."""
        cls, sep = self.token_id("[CLS]"), self.end_id
        rows = [[cls, *pieces, sep] for pieces in self._pieces(texts)]
        return self._to_device(pad(rows, self.token_id("[PAD]")))

    @property
    def start_id(self) -> int:
        """[DEC]."""
        return self.token_id("[DEC]")

    # ---- the graph ----

    def modality_of(self, module: str) -> str:
        """Vision or text; the whole text transformer is text, as in the reference."""
        return "vision" if module.startswith("vision_model") else "text"

    def stream_of(self, module: str) -> str:
        """As in the reference, the encoder's inputs count for what it shares with the decoder."""
        if (
            module.startswith("vision_model")
            or "crossattention.self.key" in module
            or "crossattention.self.value" in module
        ):
            return "image"
        return "decoder" if module.startswith("text_decoder") else "text"

    def layer_of(self, parameter: str) -> str:
        """The layer's name in the encoder for what the decoder shares or has copied from it."""
        name = parameter.removesuffix(".weight")
        if name.startswith("text_decoder.bert.") and ".attention." not in name:
            return "text_encoder." + name.removeprefix("text_decoder.bert.")
        return name

    def add_task_head(self, task: str) -> None:
        """Unties, in place, what the task fine-tunes apart: encoder and decoder of captioning and VQA."""
        if task == "vqa":
            self.check_answer_width(self.vision_proj.in_features, self.text_proj.in_features)
        if task in ("captioning", "vqa"):
            decoder = self.text_decoder.bert
            decoder.embeddings = copy.deepcopy(decoder.embeddings)
            for layer in decoder.encoder.layer:
                for name in TIED[1:]:
                    setattr(layer, name, copy.deepcopy(getattr(layer, name)))
            self._tie_head()

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Vision encoder, image-grounded encoder and decoder on aligned pairs."""
        images = self._recorded_images(batch)
        states = TextStates(self.tokenize(batch.texts), torch.empty(0))
        self._recorded_fusion(states, images)
        self._recorded_decoder(batch, images)

    def _recorded_images(self, batch: Batch) -> Tensor:
        with self.recording(image=None):
            return self.encode_images(self.pixels(batch.images))

    def _recorded_fusion(self, states: TextStates, images: Tensor) -> Tensor:
        with self.recording(text=states.tokens.valid, image=None):
            return self.fuse(states, images)

    def _recorded_decoder(self, batch: Batch, images: Tensor) -> Tensor:
        tokens, given = self.target_tokens(batch.texts)
        with self.recording(decoder=tokens.valid):
            logits = self.decode("caption", tokens, images, None)
        return self.sequence_losses(logits, tokens, given).sum() / tokens.valid[:, given:].sum()

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """ITC, ITM and LM. BLIP pretrains on plain pairs: regions are left out."""
        images = self._recorded_images(batch)
        states = self.encode_texts(batch.texts)
        image_features, text_features = self.image_features(images), self.text_features(states.hidden)
        positive = torch.eye(len(images), dtype=torch.bool, device=self.device)
        negatives = self.hard_negatives(image_features, text_features, positive, generator)
        return {
            "itc": self.itc_loss(image_features, text_features, positive),
            "itm": self.itm_loss(states, images, self._recorded_fusion(states, images), negatives),
            "lm": self._recorded_decoder(batch, images),
        }


def _layer(
    layer: Any,
    hidden: Tensor,
    bias: Tensor | None,
    memory: Tensor | None = None,
    memory_bias: Tensor | None = None,
    cache: EncoderDecoderCache | None = None,
) -> Tensor:
    """Output of one text layer; transformers' own forward does not hand the memory's mask to cross-attention.

    The cache goes by position: its name is not the same in all versions of transformers.
    """
    hidden, _ = layer.attention(hidden, bias, None, cache)
    if memory is not None:
        cross = layer.crossattention
        context, _ = cross.self(hidden, None, memory, memory_bias, cache)
        hidden = cross.output(context, hidden)
    return layer.feed_forward_chunk(hidden)
