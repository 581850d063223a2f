"""CLIP (Radford et al. 2021, arXiv:2103.00020) on open_clip's modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CoCa, CustomTextCLIP, SimpleTokenizer
from open_clip.model import resize_pos_embed
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Generator, Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from vlprune.batch import Batch
from vlprune.models.base import ModelAdapter
from vlprune.models.images import ImageInput
from vlprune.models.openclip_attention import unpack_attention
from vlprune.models.text import Tokens

MAX_LOGIT_SCALE = math.log(100)  # as CLIP and open_clip train


@dataclass(frozen=True)
class OpenCLIPInput(ImageInput):
    """Pictures as `open_clip.image_transform` makes them for evaluation.

    Attributes:
        interpolation: "bicubic" or "bilinear".
    """

    interpolation: str = "bicubic"

    def _square(self, image: Image.Image) -> Image.Image:
        rgb, mode = image.convert("RGB"), InterpolationMode(self.interpolation)
        if self.fit == "squash":
            return resize(rgb, [self.size, self.size], mode)  # pyright: ignore[reportArgumentType, reportReturnType]
        scaled = resize(rgb, [self.size], mode)  # pyright: ignore[reportArgumentType]
        return center_crop(scaled, [self.size, self.size])  # pyright: ignore[reportReturnType]


class OpenCLIP(ModelAdapter):
    """A vision and a text tower whose features of one picture and its caption are alike.

    Prunable are all linear layers of both towers, the attention that pools a ResNet's grid or makes CoCa's image tokens
    among them; the projections into the common space are not, except where that is the output of a ResNet's attention.
    Deviation from open_clip's training: the logit scale is kept below 100 in the loss, not after each step.

    Attributes:
        tokenizer: of texts.
        visual: open_clip's vision tower.
        text: open_clip's text tower, causal.
        logit_scale: logarithm of the factor between similarities and logits.
    """

    family = "open_clip"
    tasks = ("retrieval",)
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
        """Unit features (n, d), and of image tokens (n, 0, d) none, since nothing reads them."""
        pooled = self.visual(pixels)
        features = F.normalize(pooled[0] if isinstance(pooled, tuple) else pooled, dim=-1)
        return features, features.new_empty(len(features), 0, features.shape[1])

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Ids up to the last end token of the batch, on the model's device; what comes after a text's own is padding.

        The towers are causal, so that cutting the padding changes no output.
        """
        ids = self.tokenizer(list(texts))
        # The end token has the highest id.
        lengths = ids.argmax(1) + 1
        length = self._kept(int(lengths.max()))
        valid = torch.arange(length) < lengths[:, None]
        return Tokens(ids[:, :length].to(self.device), valid.to(self.device))

    def _kept(self, longest: int) -> int:
        """Positions to keep of a batch whose longest text has so many tokens."""
        return longest

    def text_states(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length, width) of the text tower."""
        length = tokens.ids.shape[1]
        embedded = self.text.token_embedding(tokens.ids) + self.text.positional_embedding[:length]
        return self.text.transformer(embedded, attn_mask=self.text.attn_mask[:length, :length])

    def states_valid(self, tokens: Tokens) -> Tensor:
        """Which of the text states are no padding (n, length) bool."""
        return tokens.valid

    def text_features(self, states: Tensor, tokens: Tokens) -> Tensor:
        """Unit features (n, d) of text states: the state of the end token, projected."""
        last = tokens.valid.sum(1) - 1
        return self._projected(states[torch.arange(len(states), device=self.device), last])

    def _projected(self, state: Tensor) -> Tensor:
        state, projection = self.text.ln_final(state), self.text.text_projection
        if isinstance(projection, nn.Linear):
            state = projection(state)
        elif projection is not None:
            state = state @ projection
        return F.normalize(state, dim=-1)

    def resize_images(self, size: int) -> None:
        """Makes the model take images of another size, in place.

        Position embeddings are interpolated as open_clip does when it loads a checkpoint: bicubic, antialiased.

        Raises:
            ValueError: a size that is no multiple of the patches', or a ResNet.
        """
        if size == self.image.size:
            return
        if not isinstance(self.visual, VisionTransformer):
            raise ValueError(f"a ResNet of open_clip takes images of {self.image.size} pixels only, got {size}")
        visual: Any = self.visual
        patch = visual.patch_size[0]
        if size < patch or size % patch:
            raise ValueError(f"the image size must be a multiple of the patch size {patch}, got {size}")
        visual.image_size, visual.grid_size = (size, size), (size // patch, size // patch)
        old = visual.positional_embedding
        state = {"visual.positional_embedding": old.detach()}
        resize_pos_embed(state, self)
        table = state["visual.positional_embedding"].contiguous()
        visual.positional_embedding = nn.Parameter(table, requires_grad=old.requires_grad)
        self.image = replace(self.image, size=size)
        vision = {**self.config["model_cfg"]["vision_cfg"], "image_size": size}
        self.config = {
            **self.config,
            "model_cfg": {**self.config["model_cfg"], "vision_cfg": vision},
            "preprocess_cfg": {**self.config["preprocess_cfg"], "size": size},
        }

    # ---- the graph ----

    def modality_of(self, module: str) -> str:
        """Vision, text or, for CoCa's multimodal decoder, fusion."""
        return {"visual": "vision", "text": "text", "text_decoder": "fusion"}[module.split(".")[0]]

    def stream_of(self, module: str) -> str:
        """Image tokens feed the vision tower and the keys and values of cross-attention."""
        reads_images = ".cross_attn." in module and module.endswith(("k_proj", "v_proj"))
        return "image" if module.startswith("visual.") or reads_images else "text"

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Both towers on aligned pairs."""
        self._recorded_images(batch)
        self._recorded_text(batch)

    def _recorded_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self.recording(image=None):
            return self.encode_images(self.pixels(batch.images))

    def _recorded_text(self, batch: Batch) -> tuple[Tokens, Tensor]:
        tokens = self.tokenize(batch.texts)
        with self.recording(text=self.states_valid(tokens)):
            return tokens, self.text_states(tokens)

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """ITC, open_clip's `ClipLoss` within the batch."""
        features, _ = self._recorded_images(batch)
        tokens, states = self._recorded_text(batch)
        return {"itc": self._paired_loss(features, self.text_features(states, tokens))}

    def _paired_loss(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        positive = torch.eye(len(image_features), dtype=torch.bool, device=self.device)
        return self.itc_loss(image_features, text_features, positive)

    def itc_loss(self, image_features: Tensor, text_features: Tensor, positive: Tensor) -> Tensor:
        """Symmetric contrastive loss of unit features; positive (n, n) bool marks the pairs that belong together."""
        target = positive / positive.sum(1, keepdim=True)
        logits = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image_features @ text_features.t()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target.t())) / 2

    # ---- the tasks' interface (eval.base.VisionLanguageModel) ----

    def embed_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Unit features (n, d), and no tokens (n, 0, d): the similarity alone ranks."""
        features, _ = self.encode_images(self.pixels(images))
        return features, features.new_empty(len(features), 0, features.shape[1])

    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tokens]:
        """Unit features (n, d) and the tokens."""
        tokens = self.tokenize(texts)
        return self.text_features(self.text_states(tokens), tokens), tokens

    def match(self, image_tokens: Tensor, texts: Tokens, similarity: Tensor) -> Tensor:  # noqa: ARG002
        """The similarity (n,) itself: there is no matching head."""
        return similarity

    def retrieval_loss(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str],
        image_ids: Sequence[Any],
        generator: Generator,  # noqa: ARG002 - there are no negatives to draw
    ) -> Tensor:
        """ITC of n pairs; pairs of the same image_id are all positives."""
        features, _ = self.encode_images(self.pixels(images))
        tokens = self.tokenize(texts)
        positive = torch.tensor([[a == b for b in image_ids] for a in image_ids], device=self.device)
        return self.itc_loss(features, self.text_features(self.text_states(tokens), tokens), positive)
