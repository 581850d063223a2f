"""Beam search over any decoder that returns next-token logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

DecoderStep = Callable[[Tensor, EncoderDecoderCache], Tensor]


@torch.no_grad()
def beam_search(
    step: DecoderStep,
    n: int,
    prompt: Sequence[int],
    *,
    end: int,
    num_beams: int,
    max_length: int,
    min_length: int,
    device: torch.device,
) -> list[list[int]]:
    """The best sequence of ids of each of n inputs, without prompt and end token.

    The score of a hypothesis is its summed log probability over its whole length, prompt included and end token
    excluded, as in the reference (transformers 4 counts so, transformers 5 divides by the generated length).

    Args:
        step: (ids (n · num_beams, new), cache) -> logits (n · num_beams, vocabulary) of the token after the last;
            number i · num_beams + j is beam j of input i. The cache holds the keys and values of the ids before, and of
            what cross-attention looks at, which must be the same for all beams of an input.
        n: number of inputs.
        prompt: ids that every sequence starts with, at least one.
        end: id of the end token.
        num_beams: number of hypotheses that are kept for each input.
        max_length: most tokens of a sequence, prompt included.
        min_length: fewest tokens of a sequence, prompt included.
        device: the device on which step computes.
    """
    beams = num_beams
    ids = torch.tensor(prompt, device=device).expand(n * beams, -1)
    scores = torch.full((n, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(n)]
    open_inputs = torch.ones(n, dtype=torch.bool)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    new = ids
    offset = torch.arange(n, device=device)[:, None] * beams
    while ids.shape[1] < max_length and open_inputs.any():
        length = ids.shape[1]
        logp = step(new, cache).log_softmax(-1)
        if length < min_length:
            logp[:, end] = -torch.inf
        total = scores.view(n, beams, 1) + logp.view(n, beams, -1)
        vocabulary = total.shape[-1]
        top, flat = total.view(n, -1).topk(2 * beams, dim=1)
        source, token = flat // vocabulary, flat % vocabulary
        ended = token == end
        for i in range(n):
            if not open_inputs[i]:
                continue
            for rank in range(beams):
                if ended[i, rank] and top[i, rank] > -torch.inf:
                    sequence = ids[i * beams + int(source[i, rank])].tolist()
                    finished[i].append((float(top[i, rank]) / length, sequence))
            finished[i] = sorted(finished[i], key=lambda pair: -pair[0])[:beams]
            best_open = float(top[i][~ended[i]].max()) / length
            open_inputs[i] = len(finished[i]) < beams or finished[i][-1][0] < best_open
        _, alive = torch.where(ended, -torch.inf, top).topk(beams, dim=1)
        scores = top.gather(1, alive)
        survivors = (offset + source.gather(1, alive)).flatten()
        new = token.gather(1, alive).view(-1, 1)
        ids = torch.cat([ids[survivors], new], dim=1)
        # Cross-attention's keys and values are the same for all beams of an input.
        cache.self_attention_cache.reorder_cache(survivors)  # pyright: ignore[reportArgumentType]
    for i in range(n):
        if open_inputs[i]:
            length = ids.shape[1]
            running = [(float(scores[i, j]) / length, ids[i * beams + j].tolist()) for j in range(beams)]
            finished[i] = sorted(finished[i] + running, key=lambda pair: -pair[0])
    return [candidates[0][1][len(prompt) :] for candidates in finished]
