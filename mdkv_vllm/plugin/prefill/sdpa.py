"""Prefill by torch's own attention: slower, and on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mdkv_vllm.kernels.interface import Chunk
from mdkv_vllm.plugin.kv_cache import load_tokens
from mdkv_vllm.plugin.prefill.head_calls import FEWEST_TOKENS, HeadCall, HeadKeys, HeadStep

SCORE_ELEMENTS = 1 << 26
"""Scores that torch may write out at a time, where it has no kernel that writes none."""


class SdpaPrefill:
    """:class:`mdkv_vllm.kernels.interface.PrefillAttention`, one request after the other."""

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> SdpaStep:
        """See :class:`mdkv_vllm.kernels.interface.PrefillAttention`."""
        return SdpaStep(tuple(chunks), block_table)


@dataclass(frozen=True)
class SdpaStep:
    """:class:`mdkv_vllm.kernels.interface.PrefillStep`.

    Attributes:
        chunks: the step's chunks.
        block_table: int32 ``[rows, max_blocks]``.
    """

    chunks: tuple[Chunk, ...]
    block_table: torch.Tensor

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
        for chunk in self.chunks:
            keys, values = load_tokens(
                kv_cache, self.block_table[chunk.row], chunk.total, query.dtype
            )
            at_once = _rows_at_once(query[chunk.start : chunk.stop], keys, values)
            for first in range(0, chunk.tokens, at_once):
                count = min(at_once, chunk.tokens - first)
                seen = chunk.context + first + count
                rows = slice(chunk.start + first, chunk.start + first + count)
                result = scaled_dot_product_attention(
                    query[rows].transpose(0, 1).unsqueeze(0),
                    keys[:, :seen].unsqueeze(0),
                    values[:, :seen].unsqueeze(0),
                    attn_mask=causal_lower_right(count, seen),
                    scale=scale,
                    enable_gqa=True,
                )
                output[rows] = result.squeeze(0).transpose(0, 1)


def _rows_at_once(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Query tokens per call: all of them where torch's flash attention takes the call.

    Args:
        query: ``[tokens, query_heads, head_size]``.
        keys: ``[kv_heads, keys, head_size]``.
        values: same shape.
    """
    call = SDPAParams(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        None,
        0,
        False,
        True,
    )
    if can_use_flash_attention(call):
        return query.shape[0]
    return max(1, SCORE_ELEMENTS // (query.shape[1] * keys.shape[1]))


class SdpaHeads:
    """:class:`.head_calls.HeadAttention`, one sequence after the other, padded and masked."""

    align = 8
    packed = False
    fewest_tokens = FEWEST_TOKENS

    def prepare(self, call: HeadCall) -> HeadStep:
        """See :class:`.head_calls.HeadAttention`."""
        return partial(self._attend, call)

    def _attend(
        self, call: HeadCall, query: torch.Tensor, keys: HeadKeys, scale: float
    ) -> torch.Tensor:
        count = len(call.counts)
        position = torch.arange(call.rows // count, device=query.device)
        # Masked, what lies behind a sequence's end must yet be no NaN.
        unused = (position >= keys.lengths[:, None]).unsqueeze(-1)
        sides = (keys.keys, keys.values)
        key, value = (x.unflatten(0, (count, -1)).masked_fill(unused, 0) for x in sides)
        result = torch.empty_like(query)
        at_once = max(1, SCORE_ELEMENTS // (query.shape[1] * len(position)))
        begin = 0
        for i, tokens in enumerate(call.counts):
            for first in range(0, tokens, at_once):
                some = torch.arange(first, min(first + at_once, tokens), device=query.device)
                last = keys.lengths[i] - tokens + some
                rows = slice(begin + first, begin + first + len(some))
                found = scaled_dot_product_attention(
                    query[rows].transpose(0, 1).unsqueeze(0),
                    key[None, None, i],
                    value[None, None, i],
                    attn_mask=position <= last[:, None],
                    scale=scale,
                    enable_gqa=True,
                )
                result[rows] = found.squeeze(0).transpose(0, 1)
            begin += tokens
        return result
