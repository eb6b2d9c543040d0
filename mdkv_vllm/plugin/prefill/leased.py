"""Chunks of prompts behind leases, and beside them those without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdkv_vllm.kernels.interface import (
    Chunk,
    LeaseReader,
    PrefillAttention,
    PrefillStep,
    ReadConfig,
)
from mdkv_vllm.plugin.prefill.head_calls import HeadAttention, HeadCall, HeadStep, plan_calls


class LeasedPrefill:
    """:class:`mdkv_vllm.kernels.interface.PrefillAttention` of chunks with leases and without.

    Args:
        plain: of chunks without.
        heads: of chunks with leases.
        reader: reads what leases keep.
        config: the model.
        dtype: type of queries, in which keys are read.
    """

    def __init__(
        self,
        plain: PrefillAttention,
        heads: HeadAttention,
        reader: LeaseReader,
        config: ReadConfig,
        dtype: torch.dtype,
    ) -> None:
        self._plain = plain
        self._heads = heads
        self._reader = reader
        self._config = config
        self._dtype = dtype

    @property
    def fewest_tokens(self) -> int:
        """Of a chunk with leases; a smaller one costs less by the decode kernel, token by token."""
        return self._heads.fewest_tokens

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> PrefillStep:
        """See :class:`mdkv_vllm.kernels.interface.PrefillAttention`."""
        leased = [chunk for chunk in chunks if chunk.leases]
        if not leased:
            return self._plain.prepare(chunks, block_table)
        others = [chunk for chunk in chunks if not chunk.leases]
        plain = self._plain.prepare(others, block_table) if others else None
        calls = plan_calls(leased, block_table, self._config, self._dtype, self._heads)
        steps = tuple((call, self._heads.prepare(call)) for call in calls)
        return LeasedStep(plain, steps, self._reader)


@dataclass(frozen=True)
class LeasedStep:
    """:class:`mdkv_vllm.kernels.interface.PrefillStep`.

    Attributes:
        plain: the chunks without leases, if there are any.
        calls: those with leases, and what attends to them.
        reader: reads what leases keep.
    """

    plain: PrefillStep | None
    calls: tuple[tuple[HeadCall, HeadStep], ...]
    reader: LeaseReader

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """See :class:`mdkv_vllm.kernels.interface.PrefillStep`."""
        if self.plain is not None:
            self.plain.attend(query, key, value, kv_cache, layer, scale, output)
        heads = kv_cache.shape[1]
        queries, outputs = query.unflatten(1, (heads, -1)), output.unflatten(1, (heads, -1))
        for call, attend in self.calls:
            mine = queries[call.tokens, call.heads]
            outputs[call.tokens, call.heads] = attend(
                mine, call.read(self.reader, layer, query), scale
            )
