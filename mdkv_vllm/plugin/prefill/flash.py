"""Prefill by vLLM's FlashAttention, which reads the cache's blocks where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from mdkv_vllm.kernels.interface import Chunk
from mdkv_vllm.plugin.prefill.chunks import on_device, tokens_of
from mdkv_vllm.plugin.prefill.head_calls import FEWEST_TOKENS, HeadCall, HeadKeys, HeadStep


class FlashPrefill:
    """:class:`mdkv_vllm.kernels.interface.PrefillAttention`: all chunks in one call.

    Args:
        head_size: dimensions of a head, by which vLLM picks FlashAttention's version.
    """

    def __init__(self, head_size: int) -> None:
        self._version = get_flash_attn_version(head_size=head_size)

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> FlashStep:
        """See :class:`mdkv_vllm.kernels.interface.PrefillAttention`."""
        device = block_table.device

        def integers(numbers: Sequence[int]) -> torch.Tensor:
            return on_device(numbers, torch.int32, device)

        return FlashStep(
            tokens=tokens_of(chunks, device),
            query_starts=integers([0, *accumulate(chunk.tokens for chunk in chunks)]),
            lengths=integers([chunk.total for chunk in chunks]),
            longest_query=max(chunk.tokens for chunk in chunks),
            longest=max(chunk.total for chunk in chunks),
            block_table=block_table.index_select(0, integers([chunk.row for chunk in chunks])),
            version=self._version,
        )


@dataclass(frozen=True)
class FlashStep:
    """:class:`mdkv_vllm.kernels.interface.PrefillStep`.

    Attributes:
        tokens: the chunks' tokens in the batch.
        query_starts: int32 ``[chunks + 1]``, where each starts among them.
        lengths: int32 ``[chunks]``, context and chunk.
        longest_query: the longest chunk.
        longest: the longest of ``lengths``.
        block_table: int32 ``[chunks, max_blocks]``.
        version: FlashAttention's.
    """

    tokens: torch.Tensor | slice
    query_starts: torch.Tensor
    lengths: torch.Tensor
    longest_query: int
    longest: int
    block_table: torch.Tensor
    version: int | None

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
        head_size = query.shape[-1]
        # FlashAttention's TMA loads take no odd strides, not even of dimensions of size 1.
        keys, values = (
            canonicalize_singleton_dim_strides(side)
            for side in kv_cache.transpose(1, 2).split(head_size, dim=-1)
        )
        rows = query[self.tokens]
        in_place = isinstance(self.tokens, slice)
        result = output[self.tokens] if in_place else torch.empty_like(rows)
        flash_attn_varlen_func(
            q=rows,
            k=keys,
            v=values,
            out=result,
            cu_seqlens_q=self.query_starts,
            max_seqlen_q=self.longest_query,
            seqused_k=self.lengths,
            max_seqlen_k=self.longest,
            softmax_scale=scale,
            causal=True,
            block_table=self.block_table,
            fa_version=self.version,
        )
        if not in_place:
            output[self.tokens] = result


class FlashHeads:
    """:class:`.head_calls.HeadAttention` by one call, over keys that lie side by side.

    Args:
        head_size: dimensions of a head.
    """

    align = 1
    packed = True
    fewest_tokens = FEWEST_TOKENS

    def __init__(self, head_size: int) -> None:
        self._version = get_flash_attn_version(head_size=head_size)

    def prepare(self, call: HeadCall) -> HeadStep:
        """See :class:`.head_calls.HeadAttention`."""
        return partial(self._attend, call)

    def _attend(
        self, call: HeadCall, query: torch.Tensor, keys: HeadKeys, scale: float
    ) -> torch.Tensor:
        result = torch.empty_like(query)
        key, value = (
            canonicalize_singleton_dim_strides(side.unsqueeze(1))
            for side in (keys.keys, keys.values)
        )
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=result,
            cu_seqlens_q=call.query_starts,
            max_seqlen_q=max(call.counts),
            cu_seqlens_k=keys.starts,
            max_seqlen_k=call.most_keys,
            softmax_scale=scale,
            causal=True,
            fa_version=self._version,
        )
        return result
