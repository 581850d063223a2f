"""X-VLM (Zeng et al. 2022, arXiv:2111.08276): BERT whose upper layers look at the tokens of a vision encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedTokenizerFast

from vlprune.batch import Batch
from vlprune.models.attention import attention_bias, causal_bias, positions
from vlprune.models.base import Config
from vlprune.models.boxes import box_loss, patches_in
from vlprune.models.fusion import FusionAdapter, TextStates
from vlprune.models.images import CLIP_MEAN, CLIP_STD, ImageInput, resize_positions, square
from vlprune.models.masked_words import mask_words
from vlprune.models.modeling_xvlm import CLIP, XVLMModules
from vlprune.models.text import Tokens, pad


class XVLM(XVLMModules, FusionAdapter):
    """A vision encoder with a class token, BERT's lower layers for the text and its upper layers for the fusion.

    Deviations from the paper's training: the masked words of MLM are drawn word by word, without skip-grams, and
    the label smoothing of captioning is torch's.
    """

    family = "xvlm"
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
        fusion: Literal["split", "top"] = "split",
        image_size: int | None = None,
        **settings: Any,
    ) -> XVLM:
        """An X-VLM from a vision encoder and a BERT, in float32 and eval mode; what neither has is fresh.

        Dropout is as in the BERT's settings.

        Args:
            vision_dir: directory or hub id of a ViT, CLIP (whole or its vision encoder) or DINOv2.
            text_dir: directory or hub id of a BertModel or BertForMaskedLM with its tokenizer.
            fusion_layers: how many text layers look at the image.
            fusion: "split" makes the upper text layers the fusion layers, as in X-VLM; "top" puts copies of the upper
                text layers on top of them all.
            image_size: side of the images, a multiple of the patches'; None: as the encoder was trained.
            settings: of `XVLM` (embed_dim, prompt, ...) instead of the defaults; image_mean, image_std and image_fit
                come from preprocessor_config.json, or are as usual in the family.

        Raises:
            ValueError: an encoder without class token, a text encoder that is no BERT, too many or no fusion layers.
        """
        from vlprune.models.encoders import from_encoders

        kinds = {"fusion_layers": fusion_layers, "fusion": fusion, "image_size": image_size}
        return from_encoders(vision_dir, text_dir, **kinds, **settings)

    # ---- primitives ----

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image tokens (n, t, width), all of them normalised."""
        return self.image_tokens(pixels)

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Hidden states of the text layers."""
        return self.text_states(tokens.ids, attention_bias(tokens.valid))

    def fuse(self, texts: TextStates, images: Tensor, image_valid: Tensor | None = None) -> Tensor:
        """Hidden states of the fusion layers, which continue from the text layers."""
        return self.fused_states(texts.hidden, attention_bias(texts.tokens.valid), images, attention_bias(image_valid))

    def decode(
        self,
        kind: Literal["caption", "answer"],
        tokens: Tokens,
        memory: Tensor,
        memory_valid: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Next-token logits; captions go through all layers, answers through the fusion layers or their copy."""
        past = cache.get_seq_length() if cache is not None else 0
        layers = self.text_encoder.layer if kind == "caption" else self._answer_layers()
        return self.next_token_logits(
            layers,
            tokens.ids,
            positions(tokens, past),
            causal_bias(tokens, past),
            memory,
            attention_bias(memory_valid),
            cache,
        )

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
            table = resize_positions(embeddings.position_embedding.weight.detach(), side)
            embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
            embeddings.register_buffer("position_ids", torch.arange(len(table), device=self.device)[None], False)
            embeddings.image_size, embeddings.num_patches = size, n_patches
            embeddings.num_positions = n_patches + 1
        else:
            table = resize_positions(embeddings.position_embeddings.detach()[0], side)
            embeddings.position_embeddings = nn.Parameter(table[None])
            embeddings.patch_embeddings.image_size = embeddings.image_size = (size, size)
            embeddings.patch_embeddings.num_patches = n_patches
        vision.config.image_size = size

    def match(self, image_tokens: Tensor, texts: TextStates, similarity: Tensor) -> Tensor:
        """ITM logit of n pairs plus `itc_weight` (of X-VLM: 0) times their ITC similarity, (n,)."""
        return self.itm_head(self.fuse(texts, image_tokens)[:, 0])[:, 1] + self.itc_weight * similarity

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """[CLS] pieces, without [SEP]."""
        rows = [[self.start_id, *pieces] for pieces in self._pieces(texts)]
        return self._to_device(pad(rows, self.token_id("[PAD]")))

    @property
    def start_id(self) -> int:
        """[CLS]."""
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
        """The fusion layer's name for what the answer decoder has copied from it."""
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
                self.fresh_memory = True
                for layer in self.answer_decoder:
                    self._refresh_memory(layer, self.initializer_range)

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Vision, text and fusion layers on aligned pairs, then on regions with their phrases."""
        images, lower = self._recorded_images(self.pixels(batch.images))
        self._recorded_fusion(self._recorded_text(batch.texts), images, None)
        if phrases := _phrases(batch):
            regions, valid = self._recorded_regions(batch, lower)
            self._recorded_fusion(self._recorded_text(phrases), regions, valid)

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
        with self.recording(text=tokens.valid):
            return TextStates(tokens, self.encode_tokens(tokens))

    def _recorded_fusion(self, states: TextStates, images: Tensor, image_valid: Tensor | None) -> Tensor:
        with self.recording(text=states.tokens.valid, image=image_valid):
            return self.fuse(states, images, image_valid)

    def _recorded_regions(self, batch: Batch, lower: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, t, width) of each region and which of them lie in it (n, t); the class token always does.

        The last `local_attn_depth` layers, if any, run anew for each region and attend within it, from the images'
        hidden states below them.
        """
        index = torch.tensor([position for position, _, _ in batch.regions], device=self.device)
        boxes = torch.tensor([box for _, box, _ in batch.regions], device=self.device, dtype=torch.float32)
        side = self.image.size // self.vision_model.config.patch_size
        valid = F.pad(patches_in(boxes, side), (1, 0), value=True)
        if not self.local_attn_depth:
            return lower[index], valid
        with self.recording(image=valid):
            local = self.vision_layers(self._split_layers()[1], lower[index], attention_bias(valid))
        return self.vision_model.post_layernorm(local), valid

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """ITC, ITM and MLM of pairs and, averaged with them, of regions; box is L1 + GIoU of the regions' boxes."""
        images, lower = self._recorded_images(self.pixels(batch.images))
        losses = self._pair_losses(batch.texts, images, None, generator)
        if phrases := _phrases(batch):
            regions, valid = self._recorded_regions(batch, lower)
            regional = self._pair_losses(phrases, regions, valid, generator)
            losses = {name: (loss + regional[name]) / 2 for name, loss in losses.items()}
            losses["box"] = self._box_loss(batch, phrases, images)
        return losses

    def _pair_losses(
        self, texts: Sequence[str], images: Tensor, image_valid: Tensor | None, generator: Generator
    ) -> dict[str, Tensor]:
        states = self._recorded_text(texts)
        hidden = self._recorded_fusion(states, images, image_valid)
        image_features, text_features = self.image_features(images), self.text_features(states.hidden)
        positive = torch.tensor([[a == b for b in texts] for a in texts], device=self.device)
        negatives = self.hard_negatives(image_features, text_features, positive, generator)
        return {
            "itc": self.itc_loss(image_features, text_features, positive),
            "itm": self.itm_loss(states, images, hidden, negatives, image_valid),
            "mlm": self._mlm_loss(states.tokens, images, image_valid, generator),
        }

    def _mlm_loss(self, tokens: Tokens, images: Tensor, image_valid: Tensor | None, generator: Generator) -> Tensor:
        """Cross-entropy of masked words: a quarter of each text's words, at least one and at most eight pieces."""
        masked_ids, chosen = mask_words(tokens, self.tokenizer, generator)
        masked = Tokens(masked_ids, tokens.valid)
        hidden = self.fuse(TextStates(masked, self.encode_tokens(masked)), images, image_valid)
        return F.cross_entropy(self.text_encoder.cls(hidden[chosen]), tokens.ids[chosen])

    def _box_loss(self, batch: Batch, phrases: Sequence[str], images: Tensor) -> Tensor:
        """L1 + GIoU of the box that the phrase's fusion with the whole image predicts."""
        index = torch.tensor([position for position, _, _ in batch.regions], device=self.device)
        target = torch.tensor([box for _, box, _ in batch.regions], device=self.device, dtype=torch.float32)
        hidden = self.fuse(self.encode_texts(phrases), images[index])
        return box_loss(self.bbox_head(hidden[:, 0]).sigmoid(), target)


def _phrases(batch: Batch) -> list[str]:
    """The phrases of a batch's regions; none where all are alike, since matching needs a negative for each."""
    phrases = [phrase for _, _, phrase in batch.regions]
    return phrases if len(set(phrases)) > 1 else []
