"""CoCa (Yu et al. 2022, arXiv:2205.01917) on open_clip's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CoCa, SimpleTokenizer
from PIL import Image
from torch import Generator, Tensor
from transformers import EncoderDecoderCache

from vlprune.batch import Batch
from vlprune.models.generation import beam_search
from vlprune.models.openclip import OpenCLIP, OpenCLIPInput
from vlprune.models.openclip_attention import run_block, unpack_attention
from vlprune.models.text import Tokens

CAPTION_WEIGHT = 2.0  # of the captioning loss in pretraining; ITC has 1


class OpenCoCa(OpenCLIP):
    """A CLIP whose text tower ends in a class token and feeds a decoder that looks at image tokens.

    As in the checkpoints that there are, the mask of the class token is shifted by one position, so that it sees the
    first padding token, which therefore is not cut away, and not itself. Deviations: captions are found by plain beam
    search, open_clip's own are groups of beams; the padding token, which no caption teaches, is never generated.

    Attributes:
        text_decoder: open_clip's multimodal decoder.
        pad_id: of padding.
    """

    tasks = ("retrieval", "captioning")
    scored_losses = ("itc", "lm")

    def __init__(self, towers: CoCa, tokenizer: SimpleTokenizer, image: OpenCLIPInput) -> None:
        super().__init__(towers, tokenizer, image)
        self.text_decoder: Any = towers.text_decoder
        self.pad_id = towers.pad_id
        unpack_attention(self.text_decoder)

    # ---- towers ----

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (n, d) and the tokens (n, t, width) that the decoder looks at."""
        pooled, tokens = self.visual(pixels)
        return F.normalize(pooled, dim=-1), tokens

    def _kept(self, longest: int) -> int:
        return min(longest + 1, self.text.context_length)

    def text_states(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length + 1, width) of the tokens and the class token."""
        text, (n, length) = self.text, tokens.ids.shape
        classes = text.cls_emb.expand(n, 1, -1)
        embedded = torch.cat([text.token_embedding(tokens.ids), classes], 1)
        positions = torch.cat([text.positional_embedding[:length], text.positional_embedding[-1:]])
        seen = F.pad(tokens.ids != text.pad_id, (1, 0), value=True)
        bias = text.attn_mask[: length + 1, : length + 1].masked_fill(~seen[:, None, None], -torch.inf)
        return text.transformer(embedded + positions, attn_mask=bias)

    def states_valid(self, tokens: Tokens) -> Tensor:
        """The tokens up to the end token, and the class token."""
        return F.pad(tokens.valid, (0, 1), value=True)

    def text_features(self, states: Tensor, tokens: Tokens) -> Tensor:  # noqa: ARG002
        """Unit features (n, d) of text states: that of the class token, projected."""
        return self._projected(states[:, -1])

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Both towers and the decoder on aligned pairs."""
        _, image_tokens = self._recorded_images(batch)
        self._recorded_decoder(*self._recorded_text(batch), image_tokens)

    def _recorded_decoder(self, tokens: Tokens, states: Tensor, image_tokens: Tensor) -> Tensor:
        longest = int(tokens.valid.sum(1).max())
        with self.recording(text=tokens.valid[:, 1:longest], image=None):
            return self.caption_loss(tokens, states, image_tokens)

    def caption_loss(self, tokens: Tokens, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Mean cross-entropy of a token after the first, with open_clip's neglect of tokens with the id of padding."""
        longest = int(tokens.valid.sum(1).max())
        logits = self.text_decoder(image_tokens, states[:, : longest - 1])
        return F.cross_entropy(logits.transpose(1, 2), tokens.ids[:, 1:longest], ignore_index=self.pad_id)

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """ITC and twice the captioning loss, open_clip's `CoCaLoss` with its default weights."""
        features, image_tokens = self._recorded_images(batch)
        tokens, states = self._recorded_text(batch)
        return {
            "itc": self._paired_loss(features, self.text_features(states, tokens)),
            "lm": CAPTION_WEIGHT * self._recorded_decoder(tokens, states, image_tokens),
        }

    # ---- the tasks' interface ----

    def captioning_loss(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Captioning loss of n captions."""
        _, image_tokens = self.encode_images(self.pixels(images))
        tokens = self.tokenize(captions)
        return self.caption_loss(tokens, self.text_states(tokens), image_tokens)

    @torch.no_grad()
    def generate(self, images: Sequence[Image.Image], *, num_beams: int, max_length: int, min_length: int) -> list[str]:
        """One caption an image; lengths in tokens, the start token included.

        Raises:
            ValueError: more tokens than the text tower has positions for.
        """
        if max_length > self.text.context_length:
            raise ValueError(f"max_length must be at most {self.text.context_length}, got {max_length}")
        _, image_tokens = self.encode_images(self.pixels(images))
        memory = []
        for block in self.text_decoder.cross_attn:
            normalised = block.ln_1_kv(image_tokens)
            memory.append(block.attn.keys_values(normalised, normalised))
        rows = beam_search(
            lambda ids, cache: self._next_token_logits(ids, memory, cache),
            len(images),
            [self.tokenizer.sot_token_id],
            end=self.tokenizer.eot_token_id,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            device=self.device,
        )
        special = self.tokenizer.all_special_ids
        return [self.tokenizer.decode([i for i in row if i not in special]).strip() for row in rows]

    def _next_token_logits(
        self, ids: Tensor, memory: Sequence[tuple[Tensor, Tensor]], cache: EncoderDecoderCache
    ) -> Tensor:
        """Logits (n · beams, vocabulary) after ids (n · beams, new), which follow those whose keys are in the cache."""
        past, (rows, new) = cache.get_seq_length(), ids.shape
        bias = self.text.attn_mask[past : past + new, : past + new]
        x = self.text.token_embedding(ids) + self.text.positional_embedding[past : past + new]
        layers = [(block, None) for block in self.text.transformer.resblocks]
        layers += list(zip(self.text_decoder.resblocks, self.text_decoder.cross_attn, strict=True))
        images = iter(memory)
        for number, (block, cross) in enumerate(layers):
            normalised = block.ln_1(x)
            own = block.attn.keys_values(normalised, normalised)
            x = run_block(block, x, *cache.self_attention_cache.update(*own, number), bias)
            if cross is not None:
                # All beams of an image look at one memory, so that they are queries of one sequence.
                keys, values = next(images)
                x = run_block(cross, x.reshape(len(keys), -1, x.shape[-1]), keys, values).view(rows, new, -1)
        logits = self.text_decoder.ln_final(x[:, -1]) @ self.text_decoder.text_projection
        logits = logits[:, : self.tokenizer.vocab_size]
        logits[:, self.pad_id] = -torch.inf
        return logits
