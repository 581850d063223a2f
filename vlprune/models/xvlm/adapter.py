"""X-VLM (Zeng et al. 2022, arXiv:2111.08276): BERT whose upper layers look at the tokens of a vision encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedTokenizerFast

from vlprune.batch import Batch
from vlprune.config import validated
from vlprune.models.attention import additive_mask, causal_mask, positions
from vlprune.models.base import Config
from vlprune.models.fusion import MAX_WORDS, FusionAdapter, TextStates
from vlprune.models.images import CLIP_MEAN, CLIP_STD, ImageInput, resize_positions, square
from vlprune.models.text import Tokens, pad
from vlprune.models.transformers_internals import run_fusion_for_first
from vlprune.models.xvlm.boxes import box_loss, patches_in
from vlprune.models.xvlm.encoders import Fusion, read_encoders
from vlprune.models.xvlm.masked_words import mask_words
from vlprune.models.xvlm.modeling_xvlm import CLIP, XVLMModules


@validated
class XVLMOptions:
    """Options of X-VLM; None leaves the model as its checkpoint says.

    Attributes:
        prompt: the words that every caption begins with, such as "a picture of ".
        label_smoothing: label smoothing of the language-model losses.
        itc_weight: weight of the ITC similarity beside the ITM logit in the re-ranking of retrieval; X-VLM's own is 0.
    """

    prompt: str | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    itc_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class XVLM(XVLMModules, FusionAdapter):
    """A vision encoder with a class token, BERT's lower layers for the text and its upper layers for the fusion.

    Deviations from the paper's training, beside those of `FusionAdapter`: the masked words of MLM are drawn word by
    word, without skip-grams, and the label smoothing of captioning is torch's.

    Attributes:
        fusion_layer: number of the first text layer that looks at the image.
        local_attn_depth: number of the upper vision layers that run anew for each region and attend within it.
        itc_weight: weight of the ITC similarity beside the ITM logit in `match`.
        initializer_range: standard deviation of fresh weights.
    """

    family = "xvlm"
    options = XVLMOptions
    uses_regions = True
    scored_losses = ("itc", "itm", "mlm")
    excluded = (*FusionAdapter.excluded, "bbox_head", "text_encoder.cls", "answer_decoder")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vision: Config,
        text: Config,
        fusion_layer: int,
        embed_dim: int = 256,
        local_attn_depth: int = 4,
        label_smoothing: float = 0.1,
        prompt: str = "a picture of ",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        image_fit: str = "squash",
        itc_weight: float = 0.0,
    ) -> None:
        image = ImageInput(square(vision["image_size"]), tuple(image_mean), tuple(image_std), image_fit)
        super().__init__(tokenizer, image, label_smoothing, prompt)
        self.add_modules(vision, text, fusion_layer, embed_dim)
        self.initializer_range = text.get("initializer_range", 0.02)
        self.image_width, self.text_width = self.vision_proj.in_features, self.text_proj.in_features
        if vision.get("model_type", CLIP) != CLIP and local_attn_depth:
            raise ValueError(f"local attention is for CLIP's layers alone, {vision['model_type']} must have depth 0")
        self.local_attn_depth = local_attn_depth
        self.itc_weight = itc_weight

    @classmethod
    def from_encoders(
        cls,
        vision_dir: str | Path,
        text_dir: str | Path,
        *,
        fusion_layers: int,
        fusion: Fusion = "split",
        image_size: int | None = None,
        **settings: Any,
    ) -> Self:
        """An X-VLM from a vision encoder and a BERT, in float32 and evaluation mode.

        Cross-attention, projections and heads, which neither of them has, are fresh. Dropout is as in the BERT's
        settings.

        Args:
            vision_dir: directory or hub id of a ViT, CLIP (whole or its vision encoder) or DINOv2.
            text_dir: directory or hub id of a BertModel or BertForMaskedLM with its tokenizer.
            fusion_layers: number of text layers that look at the image.
            fusion: "split" makes the upper text layers the fusion layers, as in X-VLM; "top" puts copies of the upper
                text layers on top of them all.
            image_size: side of the images, a multiple of the patches'; None: as the encoder was trained.
            settings: further arguments of `XVLM` (embed_dim, prompt, ...) instead of its defaults; image_mean,
                image_std and image_fit come from preprocessor_config.json, or are as usual in the encoder's family.

        Raises:
            ValueError: the vision encoder has no class token, the text encoder is no BERT or takes too short texts,
                there are too many or no fusion layers.
        """
        found = read_encoders(vision_dir, text_dir, fusion_layers=fusion_layers, fusion=fusion, min_length=MAX_WORDS)
        model = cls.from_config({"family": cls.family, **found.config, **settings}, found.tokenizer)
        model.vision_model.load_state_dict(found.vision)
        found.fill_text(model.text_encoder)
        if image_size is not None:
            model.resize_images(image_size)
        return model.eval()

    # ---- primitives ----

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image tokens (n, t, width) of pixels (n, 3, size, size), after the last layer norm."""
        return self.image_tokens(pixels)

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length, width) of the text layers."""
        return self.text_states(tokens.ids, additive_mask(tokens.attention_mask))

    def fuse(self, texts: TextStates, images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Hidden states (n, length, width) of the fusion layers, which continue from the text layers."""
        mask = additive_mask(texts.tokens.attention_mask)
        return self.fused_states(texts.hidden, mask, images, additive_mask(image_mask))

    def fuse_first(self, texts: TextStates, images: Tensor) -> Tensor:
        """The state of [CLS] after the fusion layers."""
        layers, mask = self.text_encoder.layer[self.fusion_layer :], additive_mask(texts.tokens.attention_mask)
        return run_fusion_for_first(layers, texts.hidden, mask, images)

    def decode(
        self,
        kind: Literal["caption", "answer"],
        tokens: Tokens,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Next-token logits; captions go through all layers, answers through the fusion layers or their copy."""
        past = cache.get_seq_length() if cache is not None else 0
        layers = self.text_encoder.layer if kind == "caption" else self._answer_layers()
        hidden = self.decoder_states(
            layers,
            tokens.ids,
            positions(tokens, past),
            causal_mask(tokens, past),
            encoder_hidden_states,
            additive_mask(encoder_attention_mask),
            cache,
        )
        return self.text_encoder.cls(hidden)

    def _answer_layers(self) -> Iterable[nn.Module]:
        if hasattr(self, "answer_decoder"):
            return self.answer_decoder
        return self.text_encoder.layer[self.fusion_layer :]

    def resize_images(self, size: int) -> None:
        """Makes the model take images of another size, in place; position embeddings are interpolated bicubically."""
        vision = self.vision_model
        side = self.grid(size, vision.config.patch_size)
        embeddings, n_patches = vision.embeddings, side * side
        if vision.config.model_type == CLIP:
            resized = resize_positions(embeddings.position_embedding.weight.detach(), side)
            embeddings.position_embedding = nn.Embedding.from_pretrained(resized, freeze=False)
            embeddings.register_buffer("position_ids", torch.arange(len(resized), device=self.device)[None], False)
            embeddings.image_size, embeddings.num_patches = size, n_patches
            embeddings.num_positions = n_patches + 1
        else:
            resized = resize_positions(embeddings.position_embeddings.detach()[0], side)
            embeddings.position_embeddings = nn.Parameter(resized[None])
            embeddings.patch_embeddings.image_size = embeddings.image_size = (size, size)
            embeddings.patch_embeddings.num_patches = n_patches
        vision.config.image_size = size

    def match(self, image_tokens: Tensor, texts: TextStates, similarity: Tensor) -> Tensor:
        """Re-ranking scores (n,) of n pairs: the ITM logit plus `itc_weight` times the ITC similarity (n,).

        Equally many of the n texts belong to each of the images, one image's after another's.
        """
        return self.itm_head(self.fuse_first(texts, image_tokens))[:, 1] + self.itc_weight * similarity

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts as [CLS], pieces, without [SEP]."""
        sequences = [[self.start_id, *pieces] for pieces in self._pieces(texts)]
        return self._to_device(pad(sequences, self.token_id("[PAD]")))

    @property
    def start_id(self) -> int:
        """Id of [CLS]."""
        return self.token_id("[CLS]")

    # ---- the graph ----

    def modality_of(self, module: str) -> str:
        """Vision, text (lower BERT layers) or fusion (upper ones)."""
        if module.startswith("vision_model"):
            return "vision"
        return "fusion" if int(module.split(".layer.")[1].split(".")[0]) >= self.fusion_layer else "text"

    def stream_of(self, module: str) -> str:
        """Image tokens feed the vision layers and the keys and values of cross-attention."""
        if (
            module.startswith("vision_model")
            or "crossattention.self.key" in module
            or "crossattention.self.value" in module
        ):
            return "image"
        return "text"

    def layer_of(self, parameter: str) -> str:
        """The fusion layer's name, for what the answer decoder has copied from it."""
        name = parameter.removesuffix(".weight")
        if name.startswith("answer_decoder.") and not self._is_fresh(name):
            number, rest = name.removeprefix("answer_decoder.").split(".", 1)
            return f"text_encoder.layer.{self.fusion_layer + int(number)}.{rest}"
        return name

    def add_task_head(self, task: str) -> None:
        """Adds, in place, VQA's answer decoder: a copy of the fusion layers.

        The copy keeps the masks of the layers it comes from; the reference leaves it dense by default.
        """
        if task == "vqa":
            self.answer_decoder = copy.deepcopy(self.text_encoder.layer[self.fusion_layer :])
            if self.image_width != self.text_width:
                self.fresh_cross_attention = True
                for layer in self.answer_decoder:
                    self._renew_cross_attention(layer, self.initializer_range)

    # ---- pretraining ----

    def n_samples(self, batch: Batch) -> int:
        """The pairs of a batch and the regions that its losses look at."""
        return len(batch.images) + len(_phrases(batch))

    def calibration_forward(self, batch: Batch) -> None:
        """Runs vision, text and fusion layers on aligned pairs, then on regions with their phrases."""
        images, lower = self._recorded_images(self.pixels(batch.images))
        self._recorded_fusion(self._recorded_text(batch.texts), images, None)
        if phrases := _phrases(batch):
            regions, inside = self._recorded_regions(batch, lower)
            self._recorded_fusion(self._recorded_text(phrases), regions, inside)

    def _recorded_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens, and the hidden states (n, t, width) below the layers that look at regions by themselves."""
        if not self.local_attn_depth:
            with self.recording(image=None):
                tokens = self.encode_images(pixels)
            return tokens, tokens
        lower, upper = self._split_layers()
        with self.recording(image=None):
            hidden = self.vision_layers(lower, self.patches(pixels), None)
            return self.vision_model.post_layernorm(self.vision_layers(upper, hidden, None)), hidden

    def _split_layers(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        layers = list(self.vision_model.encoder.layers)
        depth = len(layers) - self.local_attn_depth
        return layers[:depth], layers[depth:]

    def _recorded_text(self, texts: Sequence[str]) -> TextStates:
        tokens = self.tokenize(texts)
        with self.recording(text=tokens.attention_mask):
            return TextStates(tokens, self.encode_tokens(tokens))

    def _recorded_fusion(self, states: TextStates, images: Tensor, image_mask: Tensor | None) -> Tensor:
        with self.recording(text=states.tokens.attention_mask, image=image_mask):
            return self.fuse(states, images, image_mask)

    def _recorded_regions(self, batch: Batch, lower: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, t, width) of each region, and the attention mask (n, t) of those inside it and the class token.

        The last `local_attn_depth` layers, if any, run anew for each region and attend within it, from the images'
        hidden states below them.
        """
        index = torch.tensor([position for position, _, _ in batch.regions], device=self.device)
        boxes = torch.tensor([box for _, box, _ in batch.regions], device=self.device, dtype=torch.float32)
        side = self.image.size // self.vision_model.config.patch_size
        inside = F.pad(patches_in(boxes, side), (1, 0), value=True)
        if not self.local_attn_depth:
            return lower[index], inside
        with self.recording(image=inside):
            local = self.vision_layers(self._split_layers()[1], lower[index], additive_mask(inside))
        return self.vision_model.post_layernorm(local), inside

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """ITC, ITM and MLM of pairs and, averaged with them, of regions; "box" is the loss of the regions' boxes."""
        images, lower = self._recorded_images(self.pixels(batch.images))
        losses = self._pair_losses(batch.texts, images, None, generator)
        if phrases := _phrases(batch):
            regions, inside = self._recorded_regions(batch, lower)
            regional = self._pair_losses(phrases, regions, inside, generator)
            losses = {name: (loss + regional[name]) / 2 for name, loss in losses.items()}
            losses["box"] = self._box_loss(batch, phrases, images)
        return losses

    def _pair_losses(
        self, texts: Sequence[str], images: Tensor, image_mask: Tensor | None, generator: Generator
    ) -> dict[str, Tensor]:
        states = self._recorded_text(texts)
        hidden = self._recorded_fusion(states, images, image_mask)
        image_features, text_features = self.image_features(images), self.text_features(states.hidden)
        positive = torch.tensor([[a == b for b in texts] for a in texts], device=self.device)
        negatives = self.hard_negatives(image_features, text_features, positive, generator)
        return {
            "itc": self.itc_loss(image_features, text_features, positive),
            "itm": self.itm_loss(states, images, hidden, negatives, image_mask),
            "mlm": self._mlm_loss(states.tokens, images, image_mask, generator),
        }

    def _mlm_loss(self, tokens: Tokens, images: Tensor, image_mask: Tensor | None, generator: Generator) -> Tensor:
        """Cross-entropy of the pieces that `mask_words` chooses."""
        masked_ids, chosen = mask_words(tokens, self.tokenizer, generator)
        masked = Tokens(masked_ids, tokens.attention_mask)
        hidden = self.fuse(TextStates(masked, self.encode_tokens(masked)), images, image_mask)
        return F.cross_entropy(self.text_encoder.cls(hidden[chosen]), tokens.ids[chosen])

    def _box_loss(self, batch: Batch, phrases: Sequence[str], images: Tensor) -> Tensor:
        """Loss of the box that the fusion of a region's phrase with the whole image predicts."""
        index = torch.tensor([position for position, _, _ in batch.regions], device=self.device)
        target = torch.tensor([box for _, box, _ in batch.regions], device=self.device, dtype=torch.float32)
        hidden = self.fuse(self.encode_texts(phrases), images[index])
        return box_loss(self.bbox_head(hidden[:, 0]).sigmoid(), target)


def _phrases(batch: Batch) -> list[str]:
    """The phrases of a batch's regions; none where all are alike, since matching needs a negative for each of them."""
    phrases = [phrase for _, _, phrase in batch.regions]
    return phrases if len(set(phrases)) > 1 else []
