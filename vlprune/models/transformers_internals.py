"""What this package uses of transformers that its documentation does not promise, gathered in one place.

The modules of X-VLM keep theirs in `modeling_xvlm.py`, which saved models carry along.
`tests/test_private_interfaces.py` names what a new version has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextAttention
from transformers.utils import logging
from transformers.utils.hub import cached_file

# What transformers calls the cache of keys and values in the layers of its models; it was renamed in version 5.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next((name for name in CACHE_NAMES if name in signature(BlipTextAttention.forward).parameters), CACHE_NAMES[0])


def run_blip_text_layer(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cache: EncoderDecoderCache | None = None,
) -> Tensor:
    """Output (n, length, width) of a layer of transformers' BLIP text model.

    The layer's own `forward` does not hand the encoder's attention mask to cross-attention, so its parts are called.

    Args:
        layer: a `BlipTextLayer`.
        hidden: its input (n, length, width).
        attention_mask: additive attention mask of the input.
        encoder_hidden_states: what cross-attention looks at (n, t, width); None leaves it out.
        encoder_attention_mask: additive attention mask of the encoder hidden states.
        cache: keys and values of the tokens before.
    """
    hidden, _ = layer.attention(hidden, attention_mask=attention_mask, **{CACHE: cache})
    if encoder_hidden_states is not None:
        cross = layer.crossattention
        context, _ = cross.self(
            hidden,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **{CACHE: cache},
        )
        hidden = cross.output(context, hidden)
    return layer.feed_forward_chunk(hidden)


def run_fusion_for_first(
    layers: Iterable[Any], hidden: Tensor, attention_mask: Tensor | None, images: Tensor
) -> Tensor:
    """States (n, width) of the first token of n texts that went through layers which look at images.

    What the matching head reads, at less cost than the whole output: the last layer runs for the first token alone, and
    the keys and values of an image are computed once for all texts that look at it.

    Args:
        layers: at least one `BlipTextLayer` or `BertLayer`, each with cross-attention.
        hidden: input (n, length, width) of the first layer.
        attention_mask: additive attention mask of the input.
        images: image tokens (n_images, t, width); the first n / n_images texts look at the first image, the next ones
            at the second, and so on.
    """
    *lower, last = layers
    for layer in lower:
        hidden, _ = layer.attention(hidden, attention_mask=attention_mask)
        hidden = _look(layer, hidden, images)
    return _look(last, _first_attended(last.attention, hidden, attention_mask), images)[:, 0]


def _look(layer: Any, hidden: Tensor, images: Tensor) -> Tensor:
    """The rest of a layer behind its self-attention: the texts of an image ask it as if they were one long text."""
    cross = layer.crossattention
    asked = hidden.view(len(images), -1, hidden.shape[-1])
    context, _ = cross.self(asked, encoder_hidden_states=images)
    return layer.feed_forward_chunk(cross.output(context.view(hidden.shape), hidden))


def _first_attended(attention: Any, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The output (n, 1, width) of a layer's self-attention for the first token."""
    own, first = attention.self, hidden[:, :1]
    query, key, value = (
        states.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
        for states in (own.query(first), own.key(hidden), own.value(hidden))
    )
    dropped = own.dropout.p if own.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, attention_mask, dropped)
    return attention.output(context.transpose(1, 2).flatten(2), first)


def file_of(where: str | Path, name: str) -> Path | None:
    """A file of a directory or of a hub id; None where there is none."""
    found = cached_file(str(where), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


@contextmanager
def no_load_reports() -> Iterator[None]:
    """A context in which transformers does not list the weights that a checkpoint lacks or has too many of."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
