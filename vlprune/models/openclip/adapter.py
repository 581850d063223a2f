"""CLIP (Radford et al. 2021, arXiv:2103.00020) on open_clip's modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CoCa, CustomTextCLIP, SimpleTokenizer
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from eval import ranks
from vlprune.batch import Batch
from vlprune.models.base import ModelAdapter
from vlprune.models.images import ImageInput
from vlprune.models.openclip import internals
from vlprune.models.openclip.attention import unpack_attention
from vlprune.models.text import Tokens

MAX_LOGIT_SCALE = math.log(100)  # as CLIP and open_clip train


@dataclass(frozen=True)
class OpenCLIPInput(ImageInput):
    """Pictures as `open_clip.image_transform` makes them for evaluation.

    Attributes:
        interpolation: how pictures are resized, "bicubic" or "bilinear".
    """

    interpolation: str = "bicubic"

    def _square(self, image: Image.Image) -> Image.Image:
        rgb, mode = image.convert("RGB"), InterpolationMode(self.interpolation)
        if self.fit == "squash":
            return resize(rgb, [self.size, self.size], mode)  # pyright: ignore[reportArgumentType, reportReturnType]
        scaled = resize(rgb, [self.size], mode)  # pyright: ignore[reportArgumentType]
        return center_crop(scaled, [self.size, self.size])  # pyright: ignore[reportReturnType]


class OpenCLIP(ModelAdapter):
    """A vision and a text tower that are trained to give a picture and its caption similar features.

    Prunable are all linear layers of both towers, the attention that pools a ResNet's grid or makes CoCa's image tokens
    among them; the projections into the common space are not, except where that is the output of a ResNet's attention.
    Deviation from open_clip's training: the logit scale is kept below 100 in the loss, not after each step.

    Attributes:
        tokenizer: the tokenizer of all texts.
        visual: open_clip's vision tower.
        text: open_clip's text tower, causal.
        logit_scale: logarithm of the factor between similarities and logits.
    """

    family = "open_clip"
    scored_losses = ("itc",)
    excluded = ("text_projection",)

    def __init__(self, towers: CustomTextCLIP | CoCa, tokenizer: SimpleTokenizer, image: OpenCLIPInput) -> None:
        super().__init__(image)
        self.tokenizer = tokenizer
        self.visual: Any = towers.visual
        self.text: Any = towers.text
        self.logit_scale = towers.logit_scale
        unpack_attention(self)

    # ---- towers ----

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of unit length (n, d), and no image tokens (n, 0, d), since nothing reads them."""
        pooled = self.visual(pixels)
        features = F.normalize(pooled[0] if isinstance(pooled, tuple) else pooled, dim=-1)
        return features, features.new_empty(len(features), 0, features.shape[1])

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts up to the last end token of the batch, on the model's device; after a text's own end comes padding.

        The towers are causal, so that leaving out further padding changes no output.
        """
        ids = self.tokenizer(list(texts))
        # The end token has the highest id.
        lengths = ids.argmax(1) + 1
        length = self._kept(int(lengths.max()))
        attention_mask = torch.arange(length) < lengths[:, None]
        return Tokens(ids[:, :length].to(self.device), attention_mask.to(self.device))

    def _kept(self, longest: int) -> int:
        """Number of positions to keep of a batch whose longest text has so many tokens."""
        return longest

    def text_states(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length, width) of the text tower."""
        return internals.text_states(self.text, tokens)

    def states_mask(self, tokens: Tokens) -> Tensor:
        """Attention mask (n, length) bool of the text states."""
        return tokens.attention_mask

    def text_features(self, states: Tensor, tokens: Tokens) -> Tensor:
        """Features of unit length (n, d) of text states: the state of the end token, projected."""
        last = tokens.attention_mask.sum(1) - 1
        return self._projected(states[torch.arange(len(states), device=self.device), last])

    def _projected(self, state: Tensor) -> Tensor:
        return F.normalize(internals.project_text(self.text, state), dim=-1)

    def resize_images(self, size: int) -> None:
        """Makes the model take images of another size, in place.

        Position embeddings are interpolated as open_clip does when it loads a checkpoint: bicubic, antialiased.

        Raises:
            ValueError: the size is no multiple of the patch size, or the vision tower is a ResNet.
        """
        if size == self.image.size:
            return
        if not isinstance(self.visual, internals.VisionTransformer):
            raise ValueError(f"a ResNet of open_clip takes images of {self.image.size} pixels only, got {size}")
        internals.resize_vision(self.visual, size)
        self.image = replace(self.image, size=size)
        vision = {**self.config["model_cfg"]["vision_cfg"], "image_size": size}
        self.config = {
            **self.config,
            "model_cfg": {**self.config["model_cfg"], "vision_cfg": vision},
            "preprocess_cfg": {**self.config["preprocess_cfg"], "size": size},
        }

    # ---- the graph ----

    def modality_of(self, module: str) -> str:
        """The modality of a module: vision, text or, for CoCa's multimodal decoder, fusion."""
        return {"visual": "vision", "text": "text", "text_decoder": "fusion"}[module.split(".")[0]]

    def stream_of(self, module: str) -> str:
        """Image tokens feed the vision tower and the keys and values of cross-attention."""
        reads_images = ".cross_attn." in module and module.endswith(("k_proj", "v_proj"))
        return "image" if module.startswith("visual.") or reads_images else "text"

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Runs both towers on aligned pairs."""
        self._recorded_images(batch)
        self._recorded_text(batch)

    def _recorded_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self.recording(image=None):
            return self.encode_images(self.pixels(batch.images))

    def _recorded_text(self, batch: Batch) -> tuple[Tokens, Tensor]:
        tokens = self.tokenize(batch.texts)
        with self.recording(text=self.states_mask(tokens)):
            return tokens, self.text_states(tokens)

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """ITC within the batch, open_clip's `ClipLoss`."""
        features, _ = self._recorded_images(batch)
        tokens, states = self._recorded_text(batch)
        return {"itc": self._paired_loss(features, self.text_features(states, tokens))}

    def _paired_loss(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        positive = torch.eye(len(image_features), dtype=torch.bool, device=self.device)
        return self.itc_loss(image_features, text_features, positive)

    def itc_loss(self, image_features: Tensor, text_features: Tensor, positive: Tensor) -> Tensor:
        """Symmetric contrastive loss of features of unit length; positive (n, n) bool marks what belongs together."""
        target = positive / positive.sum(1, keepdim=True)
        logits = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image_features @ text_features.t()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target.t())) / 2

    # ---- the tasks' interface (eval.base.VisionLanguageModel) ----

    def embed_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features of unit length (n, d), and no tokens (n, 0, d): the similarity alone ranks."""
        features, _ = self.encode_images(self.pixels(images))
        return features, features.new_empty(len(features), 0, features.shape[1])

    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tokens]:
        """Features of unit length (n, d), and the tokens, which `match` takes."""
        tokens = self.tokenize(texts)
        return self.text_features(self.text_states(tokens), tokens), tokens

    def match(self, image_tokens: Tensor, texts: Tokens, similarity: Tensor) -> Tensor:  # noqa: ARG002
        """Re-ranking scores (n,): the similarity itself, since there is no matching head."""
        return similarity

    def retrieval_loss(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str],
        image_ids: Sequence[Any],
        generator: Generator,  # noqa: ARG002 - there are no negatives to draw
    ) -> Tensor:
        """ITC of n pairs, those of all ranks together; pairs of the same image_id are all positives."""
        features, _ = self.encode_images(self.pixels(images))
        tokens, ids = self.tokenize(texts), ranks.listed(image_ids)
        positive = torch.tensor([[a == b for b in ids] for a in ids], device=self.device)
        text_features = self.text_features(self.text_states(tokens), tokens)
        return self.itc_loss(ranks.gathered(features), ranks.gathered(text_features), positive)
