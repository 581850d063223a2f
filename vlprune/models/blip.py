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
from vlprune.models.attention import attention_bias, causal_bias, positions
from vlprune.models.base import TASKS, Config
from vlprune.models.fusion import FusionAdapter, TextStates
from vlprune.models.images import CLIP_MEAN, CLIP_STD, ImageInput, resize_positions, square
from vlprune.models.text import Tokens, pad

TIED = ("embeddings", "crossattention", "intermediate", "output")
PRETRAINING = "pretraining"
LOSSES = {PRETRAINING: ("itc", "itm", "lm"), "retrieval": ("itc", "itm"), "captioning": ("lm",), "vqa": ("lm",)}


class BLIP(FusionAdapter):
    """A ViT, and one text transformer in three roles: unimodal encoder, image-grounded encoder, image-grounded decoder.

    After pretraining, encoder and decoder share everything except self-attention, as whole modules. A model that was
    fine-tuned for a task has the parts of that task alone and shares nothing. Deviations from the paper: ITC within the
    batch, without momentum encoders and queue; a VQA model is calibrated on captions, which it reads and writes.
    """

    family = "blip"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vision: Config,
        text: Config,
        embed_dim: int = 256,
        prompt: str = "a picture of ",
        trained_for: str = PRETRAINING,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        if trained_for not in LOSSES:
            raise ValueError(f"trained_for must be one of {', '.join(LOSSES)}, got {trained_for!r}")
        # transformers' BLIP modules have eager attention only.
        vision_config = BlipVisionConfig(**{**vision, "attn_implementation": "eager"})
        text_config = BlipTextConfig(**{**text, "attn_implementation": "eager"})
        image = ImageInput(square(vision_config.image_size), tuple(image_mean), tuple(image_std))
        super().__init__(tokenizer, image, text_config.label_smoothing, prompt)
        self.image_width, self.text_width = vision_config.hidden_size, text_config.hidden_size
        self.trained_for, self.scored_losses = trained_for, LOSSES[trained_for]
        self.tasks = TASKS if trained_for == PRETRAINING else (trained_for,)
        self.vision_model = BlipVisionModel(vision_config)
        if trained_for != "captioning":
            self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        if trained_for != "retrieval":
            # The answer decoder reads fused states of the text's width, where a captioner reads image tokens.
            memory = {"encoder_hidden_size": self.text_width} if trained_for == "vqa" else {}
            decoder = {**text, **memory, "attn_implementation": "eager"}
            self.text_decoder = BlipTextLMHeadModel(BlipTextConfig(**decoder))
            self._tie_head()
        if trained_for in (PRETRAINING, "retrieval"):
            self.vision_proj = nn.Linear(vision_config.hidden_size, embed_dim)
            self.text_proj = nn.Linear(text_config.hidden_size, embed_dim)
            self.itm_head = nn.Linear(text_config.hidden_size, 2)
            self.temp = nn.Parameter(torch.tensor(0.07))
        if trained_for == PRETRAINING:
            self._tie()

    def _tie(self) -> None:
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
        reads_memory = "crossattention.self.key" in module or "crossattention.self.value" in module
        if module.startswith("text_decoder"):
            return "memory" if reads_memory else "decoder"
        return "image" if reads_memory or module.startswith("vision_model") else "text"

    def layer_of(self, parameter: str) -> str:
        """The layer's name in the encoder for what the decoder shares or has copied from it."""
        name = parameter.removesuffix(".weight")
        copied = name.startswith("text_decoder.bert.") and ".attention." not in name
        if copied and self.trained_for == PRETRAINING and not self._is_fresh(name):
            return "text_encoder." + name.removeprefix("text_decoder.bert.")
        return name

    def add_task_head(self, task: str) -> None:
        """Unties, in place, what the task fine-tunes apart: encoder and decoder of captioning and VQA.

        Where image and text tokens differ in width, VQA's decoder gets fresh keys and values, as in the reference.
        """
        if self.trained_for != PRETRAINING or task == "retrieval":
            return
        decoder = self.text_decoder.bert
        decoder.embeddings = copy.deepcopy(decoder.embeddings)
        for layer in decoder.encoder.layer:
            for name in TIED[1:]:
                setattr(layer, name, copy.deepcopy(getattr(layer, name)))
            if task == "vqa" and self.image_width != self.text_width:
                self.fresh_memory = True
                self._refresh_memory(layer, decoder.config.initializer_range)
        self._tie_head()

    def resize_images(self, size: int) -> None:
        """Makes the model take images of another size, in place; position embeddings are interpolated bicubically."""
        embeddings = self.vision_model.embeddings
        side = self.grid(size, embeddings.patch_embedding.kernel_size[0])
        embeddings.position_embedding = nn.Parameter(
            resize_positions(embeddings.position_embedding.detach()[0], side)[None]
        )
        embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, side * side, side * side + 1
        self.vision_model.config.image_size = size

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Vision encoder, image-grounded encoder and decoder on aligned pairs; those of them that there are."""
        images = self._recorded_images(batch)
        fused, valid = images, None
        if self.trained_for != "captioning":
            states = TextStates(self.tokenize(batch.texts), torch.empty(0))
            fused = self._recorded_fusion(states, images)
            valid = states.tokens.valid
        if self.trained_for == "vqa":
            self._recorded_decoder(batch, fused, valid)
        elif self.trained_for != "retrieval":
            self._recorded_decoder(batch, images, None)

    def _recorded_images(self, batch: Batch) -> Tensor:
        with self.recording(image=None):
            return self.encode_images(self.pixels(batch.images))

    def _recorded_fusion(self, states: TextStates, images: Tensor) -> Tensor:
        with self.recording(text=states.tokens.valid, image=None):
            return self.fuse(states, images)

    def _recorded_decoder(self, batch: Batch, memory: Tensor, memory_valid: Tensor | None) -> Tensor:
        tokens, given = self.target_tokens(batch.texts)
        with self.recording(decoder=tokens.valid, memory=memory_valid):
            logits = self.decode("caption", tokens, memory, memory_valid)
        return self.sequence_losses(logits, tokens, given).sum() / tokens.valid[:, given:].sum()

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """ITC, ITM and LM, those that the model was trained with; BLIP pretrains on plain pairs, without regions."""
        images = self._recorded_images(batch)
        if self.trained_for == "captioning":
            return {"lm": self._recorded_decoder(batch, images, None)}
        if self.trained_for == "vqa":
            asked = TextStates(self.tokenize(batch.texts), torch.empty(0))
            return {"lm": self._recorded_decoder(batch, self._recorded_fusion(asked, images), asked.tokens.valid)}
        states = self.encode_texts(batch.texts)
        image_features, text_features = self.image_features(images), self.text_features(states.hidden)
        positive = torch.eye(len(images), dtype=torch.bool, device=self.device)
        negatives = self.hard_negatives(image_features, text_features, positive, generator)
        losses = {
            "itc": self.itc_loss(image_features, text_features, positive),
            "itm": self.itm_loss(states, images, self._recorded_fusion(states, images), negatives),
        }
        if self.trained_for == PRETRAINING:
            losses["lm"] = self._recorded_decoder(batch, images, None)
        return losses


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
