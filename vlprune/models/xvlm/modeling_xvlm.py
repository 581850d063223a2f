"""X-VLM's modules (Zeng et al. 2022, arXiv:2111.08276) on transformers alone.

The adapter is made of them, and a saved model carries this file, so that
`AutoModel.from_pretrained(directory, trust_remote_code=True)` loads it where nothing else of this project is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    CLIPVisionModel,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertOnlyMLMHead

CLIP = "clip_vision_model"
# What transformers calls the cache of keys and values in BERT's layers; it was renamed in version 5.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next((name for name in CACHE_NAMES if name in signature(BertLayer.forward).parameters), CACHE_NAMES[0])


class TextEncoder(nn.Module):
    """BERT whose upper layers, from `fusion_layer` on, look at the image too."""

    def __init__(self, config: BertConfig, fusion_layer: int, image_width: int) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        # transformers gives cross-attention to decoders only; the masks handed to the layers decide what is causal.
        fusion = copy.deepcopy(config)
        fusion.is_decoder = fusion.add_cross_attention = True
        configs = [fusion if i >= fusion_layer else config for i in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList([BertLayer(c, layer_idx=i) for i, c in enumerate(configs)])
        # BERT's keys and values expect what they read to be as wide as the text.
        for layer in self.layer[fusion_layer:] if image_width != config.hidden_size else ():
            attention: Any = layer.get_submodule("crossattention.self")
            attention.key = nn.Linear(image_width, config.hidden_size)
            attention.value = nn.Linear(image_width, config.hidden_size)
        self.cls = BertOnlyMLMHead(config)
        self.tie()

    def tie(self) -> None:
        """Makes the head share, in place, the embeddings of the words."""
        predictions = self.cls.predictions
        predictions.decoder.weight = self.embeddings.word_embeddings.weight
        predictions.bias = predictions.decoder.bias


class XVLMModules(nn.Module):
    """The parts of X-VLM and how tensors go through them; attention masks are additive, (n, 1, 1 or length, t).

    What is used of transformers beyond its documentation is in here: the parts of CLIP's vision encoder and the
    layers of BERT, which are called one by one.
    """

    vision_model: Any  # CLIP's, ViT's or DINOv2's
    text_encoder: Any

    def add_modules(
        self, vision: Mapping[str, Any], text: Mapping[str, Any], fusion_layer: int, embed_dim: int
    ) -> None:
        """Makes the parts, in place, with fresh weights.

        Args:
            vision: settings of a vision encoder with a class token, in transformers' words; `model_type` says which
                one (without it CLIP's).
            text: settings of BERT, in transformers' words.
            fusion_layer: number of the first text layer that looks at the image.
            embed_dim: width of the features that ITC compares.
        """
        # The kind of attention is set, so that it does not depend on what else is installed.
        vision_config = AutoConfig.for_model(**{"model_type": CLIP, **vision, "attn_implementation": "sdpa"})
        text_config = BertConfig(**{**text, "attn_implementation": "sdpa"})
        self.fusion_layer = fusion_layer
        self.vision_model = _vision_model(vision_config)
        self.text_encoder = TextEncoder(text_config, fusion_layer, vision_config.hidden_size)
        self.vision_proj = nn.Linear(vision_config.hidden_size, embed_dim)
        self.text_proj = nn.Linear(text_config.hidden_size, embed_dim)
        self.itm_head = _head(text_config.hidden_size, 2)
        self.bbox_head = _head(text_config.hidden_size, 4)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.text_encoder.apply(lambda module: _init(module, text_config.initializer_range))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Image tokens (n, t, width) of pixels (n, 3, size, size), after the last layer norm."""
        vision = self.vision_model
        if isinstance(vision, CLIPVisionModel):
            return vision.post_layernorm(self.vision_layers(vision.encoder.layers, self.patches(pixels), None))
        return vision(pixels).last_hidden_state

    def patches(self, pixels: Tensor) -> Tensor:
        """The input (n, t, width) of the first of CLIP's layers."""
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))

    @staticmethod
    def vision_layers(layers: Iterable[nn.Module], hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Output (n, t, width) of layers of CLIP, one after the other."""
        for layer in layers:
            hidden = layer(hidden, attention_mask=attention_mask)
        return hidden

    def text_states(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states (n, length, width) of the text layers."""
        hidden = self.text_encoder.embeddings(ids)
        for layer in self.text_encoder.layer[: self.fusion_layer]:
            hidden = layer(hidden, attention_mask=attention_mask)
        return hidden

    def fused_states(
        self, hidden: Tensor, attention_mask: Tensor | None, images: Tensor, image_mask: Tensor | None
    ) -> Tensor:
        """Hidden states (n, length, width) of the fusion layers, which continue from the text layers."""
        for layer in self.text_encoder.layer[self.fusion_layer :]:
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                encoder_hidden_states=images,
                encoder_attention_mask=image_mask,
            )
        return hidden

    def decoder_states(
        self,
        layers: Iterable[nn.Module],
        ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Hidden states (n, length, width) of text layers under a causal mask.

        Args:
            layers: text layers; those with cross-attention look at the encoder hidden states.
            ids: token ids (n, length).
            positions: their positions (1, length).
            attention_mask: additive causal mask.
            encoder_hidden_states: (n, t, width).
            encoder_attention_mask: additive attention mask of the encoder hidden states.
            cache: keys and values of the tokens before.
        """
        hidden = self.text_encoder.embeddings(ids, position_ids=positions)
        for layer in layers:
            grounded = layer.add_cross_attention
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states if grounded else None,
                encoder_attention_mask=encoder_attention_mask if grounded else None,
                **{CACHE: cache},
            )
        return hidden


class XVLMConfig(PreTrainedConfig):
    """The settings of `XVLMModules.add_modules`."""

    model_type = "xvlm"

    def __init__(
        self,
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        fusion_layer: int = 6,
        embed_dim: int = 256,
        **kwargs: Any,
    ) -> None:
        self.vision, self.text = dict(vision or {}), dict(text or {})
        self.fusion_layer, self.embed_dim = fusion_layer, embed_dim
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


class XVLMModel(XVLMModules, PreTrainedModel):
    """X-VLM as a model of transformers."""

    config_class = XVLMConfig
    _supports_sdpa = True
    _tied_weights_keys: ClassVar = {
        "text_encoder.cls.predictions.decoder.weight": "text_encoder.embeddings.word_embeddings.weight",
        "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
    }

    def __init__(self, config: XVLMConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.add_modules(config.vision, config.text, config.fusion_layer, config.embed_dim)
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Features, fused states and matching logits of n images and n texts.

        Args:
            pixel_values: (n, 3, size, size).
            input_ids: (n, length), [CLS] first and no [SEP].
            attention_mask: (n, length), 1 for text and 0 for padding.

        Returns:
            image_features and text_features (n, d) of unit length, fused (n, length, width), itm_logits (n, 2).
        """
        additive = torch.zeros(attention_mask.shape, device=attention_mask.device)
        additive = additive.masked_fill(attention_mask == 0, torch.finfo(torch.float32).min)[:, None, None]
        images, texts = self.image_tokens(pixel_values), self.text_states(input_ids, additive)
        fused = self.fused_states(texts, additive, images, None)
        return {
            "image_features": F.normalize(self.vision_proj(images[:, 0]), dim=-1),
            "text_features": F.normalize(self.text_proj(texts[:, 0]), dim=-1),
            "fused": fused,
            "itm_logits": self.itm_head(fused[:, 0]),
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Sets, in place, the buffers that a checkpoint does not hold."""
        super()._init_weights(module)
        if isinstance(module, BertEmbeddings):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[1])[None])
            module.token_type_ids.zero_()


def _vision_model(config: Any) -> PreTrainedModel:
    if config.model_type == CLIP:
        return CLIPVisionModel(config)
    # A pooler would be a layer that nothing reads.
    pooler = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
    return AutoModel.from_config(config, **pooler)


def _init(module: nn.Module, std: float) -> None:
    """BERT's initialisation, in place."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _head(width: int, out: int) -> nn.Sequential:
    """X-VLM's two-layer head."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, out))
