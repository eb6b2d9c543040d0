"""Prefill by xformers' memory-efficient attention, for GPUs without FlashAttention (V100, T4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from xformers.ops import memory_efficient_attention_forward
from xformers.ops.fmha.attn_bias import (
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
)

from mdkv_vllm.kernels.interface import Chunk
from mdkv_vllm.plugin.kv_cache import load_tokens
from mdkv_vllm.plugin.prefill.chunks import tokens_of
from mdkv_vllm.plugin.prefill.head_calls import FEWEST_TOKENS, HeadCall, HeadKeys, HeadStep


class XformersPrefill:
    """:class:`mdkv_vllm.kernels.interface.PrefillAttention`: all chunks in one call."""

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> XformersStep:
        """See :class:`mdkv_vllm.kernels.interface.PrefillAttention`."""
        mask = BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            [chunk.tokens for chunk in chunks],
            [chunk.total for chunk in chunks],
            device=block_table.device,
        )
        tokens = tokens_of(chunks, block_table.device)
        return XformersStep(tuple(chunks), block_table, tokens, mask)


@dataclass(frozen=True)
class XformersStep:
    """:class:`mdkv_vllm.kernels.interface.PrefillStep`.

    Attributes:
        chunks: the step's chunks.
        block_table: int32 ``[rows, max_blocks]``.
        tokens: the chunks' tokens in the batch.
        mask: which query sees which key, chunk by chunk.
    """

    chunks: tuple[Chunk, ...]
    block_table: torch.Tensor
    tokens: torch.Tensor | slice
    mask: BlockDiagonalCausalFromBottomRightMask

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
        heads = kv_cache.shape[1]
        group = query.shape[1] // heads
        loaded = [
            load_tokens(kv_cache, self.block_table[chunk.row], chunk.total, query.dtype)
            for chunk in self.chunks
        ]
        # [1, keys, kv_heads, group, head_size], the group without copies: xformers' form for GQA.
        keys, values = (
            torch.cat(side, dim=1).transpose(0, 1).unsqueeze(0).unsqueeze(3)
            .expand(-1, -1, -1, group, -1)
            for side in zip(*loaded, strict=True)
        )  # fmt: skip
        rows = query[self.tokens].unflatten(1, (heads, group)).unsqueeze(0)
        result = memory_efficient_attention_forward(
            rows, keys, values, attn_bias=self.mask, scale=scale
        )
        output[self.tokens] = result.squeeze(0).flatten(1, 2)


class XformersHeads:
    """:class:`.head_calls.HeadAttention` by one call, over keys that lie equally far apart."""

    align = 8
    packed = False
    fewest_tokens = FEWEST_TOKENS

    def prepare(self, call: HeadCall) -> HeadStep:
        """See :class:`.head_calls.HeadAttention`."""
        count = len(call.counts)
        mask = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            call.counts,
            call.rows // count,
            [call.most_keys] * count,
            device=call.query_starts.device,
        )
        return partial(self._attend, mask)

    def _attend(
        self,
        mask: BlockDiagonalCausalWithOffsetPaddedKeysMask,
        query: torch.Tensor,
        keys: HeadKeys,
        scale: float,
    ) -> torch.Tensor:
        # How many keys there are, kernels read on the device.
        mask = replace(mask, k_seqinfo=replace(mask.k_seqinfo, seqlen=keys.lengths))
        group = query.shape[1]
        key, value = (
            side[None, :, None, None].expand(-1, -1, -1, group, -1)
            for side in (keys.keys, keys.values)
        )
        result = memory_efficient_attention_forward(
            query[None, :, None], key, value, attn_bias=mask, scale=scale
        )
        return result[0, :, 0]
