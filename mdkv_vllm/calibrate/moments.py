"""Second moments of a model's keys and values over a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

CHUNK_TOKENS = 1024
"""Tokens per forward pass: as long as the prompts that get compressed, roughly."""
SKIPPED_TOKENS = 4
"""Tokens at the start of each chunk left out: attention sinks are not like other tokens."""


@dataclass
class Moments:
    """Accumulated uncentred second moments.

    Attributes:
        keys: float64 ``[layers, kv_heads, head_size, head_size]``, sum of ``k k^T`` over keys
            after rotary embedding.
        values: the same of the values.
        tokens: how many were summed.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: int


def gather_moments(
    model: Any,  # noqa: ANN401
    token_ids: list[int],
    advance: Callable[[int], None] = lambda tokens: None,
) -> Moments:
    """Run a Hugging Face causal language model over a text, chunk by chunk.

    Args:
        model: a transformers causal language model.
        token_ids: the text.
        advance: told how many tokens have just been done.

    Raises:
        ValueError: the text is shorter than one usable chunk.
    """
    total: Moments | None = None
    for chunk in _chunks(token_ids):
        with torch.inference_mode():
            cache = model(torch.tensor([chunk]), use_cache=True, logits_to_keep=1).past_key_values
        keys = torch.stack([layer.keys[0] for layer in cache.layers])
        values = torch.stack([layer.values[0] for layer in cache.layers])
        moments = [_second_moment(x[:, :, SKIPPED_TOKENS:]) for x in (keys, values)]
        if total is None:
            total = Moments(moments[0], moments[1], len(chunk) - SKIPPED_TOKENS)
        else:
            total.keys += moments[0]
            total.values += moments[1]
            total.tokens += len(chunk) - SKIPPED_TOKENS
        advance(len(chunk))
    if total is None:
        raise ValueError(f"the text has {len(token_ids)} tokens; at least 64 are needed")
    return total


def _chunks(token_ids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[start : start + CHUNK_TOKENS]
        if len(chunk) >= 64:
            yield chunk


def _second_moment(vectors: torch.Tensor) -> torch.Tensor:
    """Sum of outer products over tokens: ``[..., tokens, d]`` to float64 ``[..., d, d]``."""
    vectors = vectors.double()
    return vectors.transpose(-1, -2) @ vectors
