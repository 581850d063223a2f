"""What this package uses of open_clip that its documentation does not promise, gathered in one place.

`tests/test_private_interfaces.py` names what a new version has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vlprune.models.text import Tokens

__all__ = [
    "AttentionPool2d",
    "PreprocessCfg",
    "VisionTransformer",
    "coca_text_states",
    "decoder_blocks",
    "decoder_keys_values",
    "decoder_logits",
    "embed_next",
    "merge_preprocess_dict",
    "project_text",
    "resize_vision",
    "run_block",
    "self_keys_values",
    "text_states",
]


# ---- vision towers ----


def resize_vision(tower: Any, size: int) -> None:
    """Makes a VisionTransformer take images of another size, in place.

    Position embeddings are interpolated as open_clip does when it loads a checkpoint: bicubic, antialiased.

    Raises:
        ValueError: the size is no multiple of the patch size.
    """
    patch = tower.patch_size[0]
    if size < patch or size % patch:
        raise ValueError(f"the image size must be a multiple of the patch size {patch}, got {size}")
    tower.image_size, tower.grid_size = (size, size), (size // patch, size // patch)
    old = tower.positional_embedding
    state = {"visual.positional_embedding": old.detach()}
    # open_clip reads the size of the grid from the tower of a whole model.
    model: Any = nn.Module()
    model.visual = tower
    resize_pos_embed(state, model)
    resized = state["visual.positional_embedding"].contiguous()
    tower.positional_embedding = nn.Parameter(resized, requires_grad=old.requires_grad)


# ---- text towers ----


def text_states(tower: Any, tokens: Tokens) -> Tensor:
    """Hidden states (n, length, width) of a causal text tower, without its class token."""
    length = tokens.ids.shape[1]
    embedded = tower.token_embedding(tokens.ids) + tower.positional_embedding[:length]
    return tower.transformer(embedded, attn_mask=tower.attn_mask[:length, :length])


def coca_text_states(tower: Any, tokens: Tokens) -> Tensor:
    """Hidden states (n, length + 1, width) of the tokens and the class token of CoCa's text tower."""
    n, length = tokens.ids.shape
    classes = tower.cls_emb.expand(n, 1, -1)
    embedded = torch.cat([tower.token_embedding(tokens.ids), classes], 1)
    positions = torch.cat([tower.positional_embedding[:length], tower.positional_embedding[-1:]])
    seen = F.pad(tokens.ids != tower.pad_id, (1, 0), value=True)
    mask = tower.attn_mask[: length + 1, : length + 1].masked_fill(~seen[:, None, None], -torch.inf)
    return tower.transformer(embedded + positions, attn_mask=mask)


def project_text(tower: Any, state: Tensor) -> Tensor:
    """The final norm and the projection into the common space of a text tower's states (n, width)."""
    state, projection = tower.ln_final(state), tower.text_projection
    if isinstance(projection, nn.Linear):
        return projection(state)
    return state if projection is None else state @ projection


# ---- CoCa's decoder, token by token ----


def embed_next(tower: Any, ids: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """The text tower's input (n, new, width) for ids (n, new) that follow `past` others, and its additive causal mask.

    The mask is (new, past + new).
    """
    end = past + ids.shape[1]
    embedded = tower.token_embedding(ids) + tower.positional_embedding[past:end]
    return embedded, tower.attn_mask[past:end, :end]


def decoder_blocks(tower: Any, decoder: Any) -> list[tuple[Any, Any]]:
    """The blocks from ids to logits in their order, each with the block of cross-attention that follows it, or None."""
    unimodal = [(block, None) for block in tower.transformer.resblocks]
    return unimodal + list(zip(decoder.resblocks, decoder.cross_attn, strict=True))


def decoder_keys_values(decoder: Any, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of image tokens (n, t, width) in each block of cross-attention of an unpacked decoder."""
    normalised = [(block, block.ln_1_kv(image_tokens)) for block in decoder.cross_attn]
    return [block.attn.keys_values(tokens, tokens) for block, tokens in normalised]


def self_keys_values(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of an unpacked block's own input (n, length, width)."""
    normalised = block.ln_1(x)
    return block.attn.keys_values(normalised, normalised)


def run_block(block: Any, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output (n, length, width) of an unpacked block whose input x looks at keys and values made elsewhere.

    Args:
        block: a residual block of open_clip with an `attention.Attention`.
        x: (n, length, width).
        keys: (n, heads, t, width / heads).
        values: the values, of the same shape.
        mask: additive attention mask (length, t), or None.
    """
    x = x + block.ls_1(block.attn.attend(block.ln_1(x), keys, values, mask))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def decoder_logits(decoder: Any, state: Tensor) -> Tensor:
    """Logits (n, vocabulary) of the decoder's last states (n, width)."""
    return decoder.ln_final(state) @ decoder.text_projection
