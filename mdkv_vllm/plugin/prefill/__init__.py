"""Attention while prompts are prefilled: one module per implementation, all called alike.

When a layer attends, the chunks' own keys and values are in the cache already, at full dimension
like their context: a prompt is compressed only after its last chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens of one request, attending to their context and to each other.

    Attributes:
        start: first query token in the batch.
        stop: one past the last.
        context: tokens in the cache before them.
        row: the request's row of the block table.
    """

    start: int
    stop: int
    context: int
    row: int

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.stop - self.start

    @property
    def total(self) -> int:
        """Keys that the last of them sees."""
        return self.context + self.tokens


class PrefillStep(Protocol):
    """The chunks of one step, prepared once for all layers."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of every chunk to its context and itself, in one layer.

        Args:
            query: ``[tokens, query_heads, head_size]``, the whole batch.
            key: ``[tokens, kv_heads, head_size]``, as computed, not rounded to the cache's type.
            value: ``[tokens, kv_heads, head_size]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` view of the layer.
            scale: factor of the scores.
            output: like ``query``; the chunks' rows are written.
        """


class PrefillAttention(Protocol):
    """An implementation."""

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> PrefillStep:
        """Prepare a step.

        Args:
            chunks: in the order of their tokens.
            block_table: int32 ``[rows, max_blocks]``.
        """


def tokens_of(chunks: Sequence[Chunk], device: torch.device) -> torch.Tensor | slice:
    """Where the chunks' tokens are in the batch: a slice where they are side by side."""
    if all(a.stop == b.start for a, b in pairwise(chunks)):
        return slice(chunks[0].start, chunks[-1].stop)
    tokens = [token for chunk in chunks for token in range(chunk.start, chunk.stop)]
    return on_device(tokens, torch.int64, device)


def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device, without waiting for it."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
