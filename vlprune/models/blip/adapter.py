"""BLIP (Li et al. 2022, arXiv:2201.12086) on transformers' BLIP modules."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, EncoderDecoderCache, PreTrainedTokenizerFast
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from vlprune.batch import Batch
from vlprune.config import validated
from vlprune.models.attention import additive_mask, causal_mask, positions
from vlprune.models.base import Config
from vlprune.models.fusion import FusionAdapter, TextStates
from vlprune.models.images import CLIP_MEAN, CLIP_STD, ImageInput, resize_positions, square
from vlprune.models.text import Tokens, pad
from vlprune.models.transformers_internals import run_blip_text_layer, run_fusion_for_first

TIED = ("embeddings", "crossattention", "intermediate", "output")
PRETRAINING, RETRIEVAL, CAPTIONING, VQA = "pretraining", "retrieval", "captioning", "vqa"
LOSSES = {PRETRAINING: ("itc", "itm", "lm"), RETRIEVAL: ("itc", "itm"), CAPTIONING: ("lm",), VQA: ("lm",)}
# The methods of the tasks' interface that a model which was fine-tuned for one task has.
METHODS = {
    RETRIEVAL: frozenset({"tokens_of", "embed_images", "embed_texts", "match", "retrieval_loss"}),
    CAPTIONING: frozenset({"tokens_of", "generate", "captioning_loss"}),
    VQA: frozenset({"tokens_of", "rank_answers", "vqa_loss"}),
}


@validated
class BLIPOptions:
    """Options of BLIP; None leaves the model as its checkpoint says.

    Attributes:
        prompt: the words that every caption begins with, such as "a picture of ".
        label_smoothing: label smoothing of the language-model losses.
    """

    prompt: str | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None


class BLIP(FusionAdapter):
    """A ViT, and one text transformer in three roles: unimodal encoder, image-grounded encoder, image-grounded decoder.

    After pretraining, encoder and decoder share everything except self-attention, as whole modules. A model that was
    fine-tuned for a task has the parts of that task alone, shares nothing and can do nothing else. Deviations from the
    paper, beside those of `FusionAdapter`: ITC within the batch, without momentum encoders and queue; a VQA model is
    calibrated on captions, which it reads and writes.
    """

    family = "blip"
    options = BLIPOptions

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
        self.vision_model = BlipVisionModel(vision_config)
        if trained_for != CAPTIONING:
            self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        if trained_for != RETRIEVAL:
            # The answer decoder reads fused states of the text's width, where a captioner reads image tokens.
            read = {"encoder_hidden_size": self.text_width} if trained_for == VQA else {}
            decoder = {**text, **read, "attn_implementation": "eager"}
            self.text_decoder = BlipTextLMHeadModel(BlipTextConfig(**decoder))
            self._tie_head()
        if trained_for in (PRETRAINING, RETRIEVAL):
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

    # ---- options and tasks ----

    def apply_options(self, options: BLIPOptions) -> None:
        """Sets, in place, the options that are given; label smoothing is a setting of transformers' text config."""
        super().apply_options(options)
        if options.label_smoothing is not None:
            smoothing = self.config.pop("label_smoothing")
            self.config = {**self.config, "text": {**self.config["text"], "label_smoothing": smoothing}}

    def lacks(self, needs: Collection[str]) -> tuple[str, ...]:
        """Those of the methods that a task calls that this model has not; one of a single task has that task's."""
        if self.trained_for == PRETRAINING:
            return super().lacks(needs)
        return tuple(sorted(set(needs) - METHODS[self.trained_for]))

    # ---- primitives ----

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image tokens (n, t, width) of pixels (n, 3, size, size)."""
        return self.vision_model(pixels).last_hidden_state

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length, width) of the unimodal encoder."""
        hidden, mask = self.text_encoder.embeddings(tokens.ids), additive_mask(tokens.attention_mask)
        for layer in self.text_encoder.encoder.layer:
            hidden = run_blip_text_layer(layer, hidden, mask)
        return hidden

    def fuse(self, texts: TextStates, images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Hidden states of the image-grounded encoder, which reads the text anew after the token [ENC]."""
        hidden, mask = self._grounded_input(texts)
        additive_image_mask = additive_mask(image_mask)
        for layer in self.text_encoder.encoder.layer:
            hidden = run_blip_text_layer(layer, hidden, mask, images, additive_image_mask)
        return hidden

    def fuse_first(self, texts: TextStates, images: Tensor) -> Tensor:
        """The state of [ENC] in the image-grounded encoder."""
        return run_fusion_for_first(self.text_encoder.encoder.layer, *self._grounded_input(texts), images)

    def _grounded_input(self, texts: TextStates) -> tuple[Tensor, Tensor | None]:
        """What the image-grounded encoder begins with: embeddings (n, length, width), additive attention mask."""
        ids = texts.tokens.ids.clone()
        ids[:, 0] = self.token_id("[ENC]")
        return self.text_encoder.embeddings(ids), additive_mask(texts.tokens.attention_mask)

    def decode(
        self,
        kind: Literal["caption", "answer"],  # noqa: ARG002 - one decoder serves both
        tokens: Tokens,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Next-token logits (n, length, vocabulary) of the image-grounded decoder."""
        past = cache.get_seq_length() if cache is not None else 0
        hidden = self.text_decoder.bert.embeddings(tokens.ids, position_ids=positions(tokens, past))
        mask, encoder_mask = causal_mask(tokens, past), additive_mask(encoder_attention_mask)
        for layer in self.text_decoder.bert.encoder.layer:
            hidden = run_blip_text_layer(layer, hidden, mask, encoder_hidden_states, encoder_mask, cache)
        return self.text_decoder.cls(hidden)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts as [CLS], pieces, [SEP]."""
        cls, sep = self.token_id("[CLS]"), self.end_id
        sequences = [[cls, *pieces, sep] for pieces in self._pieces(texts)]
        return self._to_device(pad(sequences, self.token_id("[PAD]")))

    @property
    def start_id(self) -> int:
        """Id of [DEC]."""
        return self.token_id("[DEC]")

    # ---- the graph ----

    def modality_of(self, module: str) -> str:
        """Vision or text; the whole text transformer is text, as in the reference."""
        return "vision" if module.startswith("vision_model") else "text"

    def stream_of(self, module: str) -> str:
        """As in the reference, the encoder's inputs count for what it shares with the decoder."""
        reads_encoder = "crossattention.self.key" in module or "crossattention.self.value" in module
        if module.startswith("text_decoder"):
            return "encoder" if reads_encoder else "decoder"
        return "image" if reads_encoder or module.startswith("vision_model") else "text"

    def layer_of(self, parameter: str) -> str:
        """The layer's name in the encoder, for what the decoder shares with it or has copied from it."""
        name = parameter.removesuffix(".weight")
        copied = name.startswith("text_decoder.bert.") and ".attention." not in name
        if copied and self.trained_for == PRETRAINING and not self._is_fresh(name):
            return "text_encoder." + name.removeprefix("text_decoder.bert.")
        return name

    def add_task_head(self, task: str) -> None:
        """Unties, in place, what captioning and VQA fine-tune apart: encoder and decoder.

        Where image and text tokens differ in width, VQA's decoder gets fresh keys and values, as in the reference.
        """
        if self.trained_for != PRETRAINING or task not in (CAPTIONING, VQA):
            return
        decoder = self.text_decoder.bert
        decoder.embeddings = copy.deepcopy(decoder.embeddings)
        for layer in decoder.encoder.layer:
            for name in TIED[1:]:
                setattr(layer, name, copy.deepcopy(getattr(layer, name)))
            if task == VQA and self.image_width != self.text_width:
                self.fresh_cross_attention = True
                self._renew_cross_attention(layer, decoder.config.initializer_range)
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
        """Runs vision encoder, image-grounded encoder and decoder, those that there are, on aligned pairs."""
        images = self._recorded_images(batch)
        fused, mask = images, None
        if self.trained_for != CAPTIONING:
            states = TextStates(self.tokenize(batch.texts), torch.empty(0))
            fused = self._recorded_fusion(states, images)
            mask = states.tokens.attention_mask
        if self.trained_for == VQA:
            self._recorded_decoder(batch, fused, mask)
        elif self.trained_for != RETRIEVAL:
            self._recorded_decoder(batch, images, None)

    def _recorded_images(self, batch: Batch) -> Tensor:
        with self.recording(image=None):
            return self.encode_images(self.pixels(batch.images))

    def _recorded_fusion(self, states: TextStates, images: Tensor) -> Tensor:
        with self.recording(text=states.tokens.attention_mask, image=None):
            return self.fuse(states, images)

    def _recorded_decoder(
        self, batch: Batch, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None
    ) -> Tensor:
        tokens, given = self.target_tokens(batch.texts)
        with self.recording(decoder=tokens.attention_mask, encoder=encoder_attention_mask):
            logits = self.decode("caption", tokens, encoder_hidden_states, encoder_attention_mask)
        return self.sequence_losses(logits, tokens, given).sum() / tokens.attention_mask[:, given:].sum()

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """ITC, ITM and LM, those that the model was trained with; BLIP pretrains on plain pairs, without regions."""
        images = self._recorded_images(batch)
        if self.trained_for == CAPTIONING:
            return {"lm": self._recorded_decoder(batch, images, None)}
        if self.trained_for == VQA:
            asked = TextStates(self.tokenize(batch.texts), torch.empty(0))
            fused = self._recorded_fusion(asked, images)
            return {"lm": self._recorded_decoder(batch, fused, asked.tokens.attention_mask)}
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
