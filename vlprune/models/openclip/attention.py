"""Attention of open_clip with query, key, value and output as linear layers of their own, and back to one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.models.openclip.internals import AttentionPool2d

PARTS = ("q_proj", "k_proj", "v_proj")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Tokens (n, length, width) with their heads apart: (n, heads, length, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention whose four layers are modules, in place of an `nn.MultiheadAttention`.

    torch's module keeps query, key and value in one parameter and never calls its output layer, so that hooks on them
    would see nothing.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = fused.num_heads
        if fused.in_proj_weight is not None:
            weights = fused.in_proj_weight.detach().chunk(3)
        else:
            weights = [getattr(fused, f"{part}_weight").detach() for part in PARTS]
        biases = [None] * 3 if fused.in_proj_bias is None else fused.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        out = fused.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, length, width / heads) of tokens (n, length, width)."""
        return split_heads(self.k_proj(key), self.heads), split_heads(self.v_proj(value), self.heads)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Output (n, length, width) of queries (n, length, width) that look at the keys and values of `keys_values`.

        The mask is additive.
        """
        context = F.scaled_dot_product_attention(split_heads(self.q_proj(query), self.heads), keys, values, mask)
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,  # noqa: ARG002 - open_clip passes it
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Output (n, length, width); called as `nn.MultiheadAttention` with the batch first.

        Args:
            query: (n, length, width).
            key: (n, t, key width).
            value: (n, t, value width).
            need_weights: without effect; no weights are returned.
            attn_mask: additive, (length, t), (n · heads, length, t) or what broadcasts to (n, heads, length, t).
        """
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        return self.attend(query, *self.keys_values(key, value), attn_mask), None


class AttentionPool(nn.Module):
    """The attention that pools the grid of a ResNet, with its layers called as modules.

    Of the queries only that of the mean is computed, since no other is read.
    """

    def __init__(self, fused: AttentionPool2d) -> None:
        super().__init__()
        self.heads = fused.num_heads
        self.positional_embedding = fused.positional_embedding
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = fused.k_proj, fused.q_proj, fused.v_proj, fused.c_proj

    def forward(self, grid: Tensor) -> Tensor:
        """Pooled features (n, out) of a grid (n, channels, height, width)."""
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding
        query, key, value = (
            split_heads(x, self.heads) for x in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))
        )
        context = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(context.transpose(1, 2).flatten(2))[:, 0]


def unpack_attention(model: nn.Module) -> None:
    """Replaces, in place, every fused attention of a model by one whose layers are modules, with equal outputs."""
    for name, child in model.named_children():
        if isinstance(child, nn.MultiheadAttention):
            setattr(model, name, Attention(child))
        elif isinstance(child, AttentionPool2d):
            setattr(model, name, AttentionPool(child))
        else:
            unpack_attention(child)


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under the names that it had before `unpack_attention`."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for module_name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        prefix = f"{module_name}."
        weights = [state.pop(f"{prefix}{part}.weight") for part in PARTS]
        biases = [state.pop(f"{prefix}{part}.bias", None) for part in PARTS]
        # torch packs the weights where all inputs are as wide as the output, and the biases always.
        if all(weight.shape == weights[0].shape for weight in weights):
            state[f"{prefix}in_proj_weight"] = torch.cat(weights)
        else:
            state |= {f"{prefix}{part}_weight": weight for part, weight in zip(PARTS, weights, strict=True)}
        given = [bias for bias in biases if bias is not None]
        if given:
            state[f"{prefix}in_proj_bias"] = torch.cat(given)
    return state


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
