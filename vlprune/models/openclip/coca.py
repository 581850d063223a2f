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

from eval import ranks
from vlprune.batch import Batch
from vlprune.models.generation import beam_search
from vlprune.models.openclip import internals
from vlprune.models.openclip.adapter import OpenCLIP, OpenCLIPInput
from vlprune.models.openclip.attention import unpack_attention
from vlprune.models.text import Tokens

CAPTION_WEIGHT = 2.0  # weight of the captioning loss in pretraining; that of ITC is 1


class OpenCoCa(OpenCLIP):
    """A CLIP whose text tower ends in a class token and feeds a decoder that looks at image tokens.

    As in the checkpoints that there are, the mask of the class token is shifted by one position, so that it sees the
    first padding token, which therefore is not cut away, and not itself. Deviations: captions are found by plain beam
    search, open_clip's own are groups of beams; the padding token, which no caption teaches, is never generated.

    Attributes:
        text_decoder: open_clip's multimodal decoder.
        pad_id: id of the padding token.
    """

    scored_losses = ("itc", "lm")

    def __init__(self, towers: CoCa, tokenizer: SimpleTokenizer, image: OpenCLIPInput) -> None:
        super().__init__(towers, tokenizer, image)
        self.text_decoder: Any = towers.text_decoder
        self.pad_id = towers.pad_id
        unpack_attention(self.text_decoder)

    # ---- towers ----

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of unit length (n, d), and the tokens (n, t, width) that the decoder looks at."""
        pooled, tokens = self.visual(pixels)
        return F.normalize(pooled, dim=-1), tokens

    def _kept(self, longest: int) -> int:
        return min(longest + 1, self.text.context_length)

    def text_states(self, tokens: Tokens) -> Tensor:
        """Hidden states (n, length + 1, width) of the tokens and the class token."""
        return internals.coca_text_states(self.text, tokens)

    def states_mask(self, tokens: Tokens) -> Tensor:
        """Attention mask (n, length + 1) bool of the text states: tokens up to the end token, and the class token."""
        return F.pad(tokens.attention_mask, (0, 1), value=True)

    def text_features(self, states: Tensor, tokens: Tokens) -> Tensor:  # noqa: ARG002
        """Features of unit length (n, d) of text states: the state of the class token, projected."""
        return self._projected(states[:, -1])

    # ---- pretraining ----

    def calibration_forward(self, batch: Batch) -> None:
        """Runs both towers and the decoder on aligned pairs."""
        _, image_tokens = self._recorded_images(batch)
        self._recorded_decoder(*self._recorded_text(batch), image_tokens)

    def _recorded_decoder(self, tokens: Tokens, states: Tensor, image_tokens: Tensor) -> Tensor:
        longest = int(tokens.attention_mask.sum(1).max())
        with self.recording(text=tokens.attention_mask[:, 1:longest], image=None):
            return self.caption_loss(tokens, states, image_tokens)

    def caption_loss(self, tokens: Tokens, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Cross-entropy averaged over the tokens after the first; those with the id of padding do not count.

        Args:
            tokens: n captions.
            states: their text states.
            image_tokens: (n, t, width).
        """
        longest = int(tokens.attention_mask.sum(1).max())
        logits = self.text_decoder(image_tokens, states[:, : longest - 1])
        return F.cross_entropy(logits.transpose(1, 2), tokens.ids[:, 1:longest], ignore_index=self.pad_id)

    def pretraining_losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """ITC and twice the captioning loss: open_clip's `CoCaLoss` with its default weights."""
        features, image_tokens = self._recorded_images(batch)
        tokens, states = self._recorded_text(batch)
        return {
            "itc": self._paired_loss(features, self.text_features(states, tokens)),
            "lm": CAPTION_WEIGHT * self._recorded_decoder(tokens, states, image_tokens),
        }

    # ---- the tasks' interface ----

    def captioning_loss(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Captioning loss of n captions, averaged over the tokens of all ranks."""
        _, image_tokens = self.encode_images(self.pixels(images))
        tokens = self.tokenize(captions)
        loss = self.caption_loss(tokens, self.text_states(tokens), image_tokens)
        predicted = tokens.attention_mask[:, 1:] & (tokens.ids[:, 1:] != self.pad_id)
        return ranks.mean_of_all(loss, int(predicted.sum()), len(captions))

    @torch.no_grad()
    def generate(self, images: Sequence[Image.Image], *, num_beams: int, max_length: int, min_length: int) -> list[str]:
        """One caption for each picture; lengths are in tokens, the start token included.

        Raises:
            ValueError: max_length is more than the text tower has positions for.
        """
        if max_length > self.text.context_length:
            raise ValueError(f"max_length must be at most {self.text.context_length}, got {max_length}")
        _, image_tokens = self.encode_images(self.pixels(images))
        images_seen = internals.decoder_keys_values(self.text_decoder, image_tokens)
        found = beam_search(
            lambda ids, cache: self._next_token_logits(ids, images_seen, cache),
            len(images),
            [self.tokenizer.sot_token_id],
            end=self.tokenizer.eot_token_id,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            device=self.device,
        )
        special = self.tokenizer.all_special_ids
        return [self.tokenizer.decode([i for i in ids if i not in special]).strip() for ids in found]

    def _next_token_logits(
        self, ids: Tensor, images_seen: Sequence[tuple[Tensor, Tensor]], cache: EncoderDecoderCache
    ) -> Tensor:
        """Logits (n · beams, vocabulary) after ids (n · beams, new), which follow those whose keys are in the cache.

        Args:
            ids: token ids.
            images_seen: keys and values of the image tokens in each block of cross-attention.
            cache: keys and values of the tokens before, in each block.
        """
        n, new = ids.shape
        x, mask = internals.embed_next(self.text, ids, cache.get_seq_length())
        images = iter(images_seen)
        for number, (block, cross) in enumerate(internals.decoder_blocks(self.text, self.text_decoder)):
            own = internals.self_keys_values(block, x)
            x = internals.run_block(block, x, *cache.self_attention_cache.update(*own, number), mask)
            if cross is not None:
                # All beams of an image look at the same tokens, so that they are queries of one sequence.
                keys, values = next(images)
                x = internals.run_block(cross, x.reshape(len(keys), -1, x.shape[-1]), keys, values).view(n, new, -1)
        logits = internals.decoder_logits(self.text_decoder, x[:, -1])[:, : self.tokenizer.vocab_size]
        logits[:, self.pad_id] = -torch.inf
        return logits
