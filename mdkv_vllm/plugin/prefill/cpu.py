"""Prefill attention by vLLM's own CPU kernel, over a scratch cache of one layer.

That kernel is the fastest here (2.6 times torch's flash attention on one core at 2K tokens),
but it reads a layout of its own. So each layer's context and chunk are copied into
scratch blocks of that layout; the copy is linear in tokens where attention is quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from vllm import _custom_ops as vllm_ops

from mdkv_vllm.kernels.interface import Chunk
from mdkv_vllm.plugin.compat import attention_isa
from mdkv_vllm.plugin.kv_cache import load_tokens
from mdkv_vllm.plugin.prefill.head_calls import HeadCall, HeadKeys, HeadStep

SCRATCH_BLOCK = 128
"""Tokens per scratch block, the stock backend's own block size."""
FEWEST_TOKENS = 512
"""Of a chunk behind leases: per token, the decode kernel is about as fast (AVX-512) and reads
nothing back first. They are even at 500 tokens in float32, and at 500 to 1,000 in bfloat16."""
FEWEST_TOKENS_AMX = 128
"""The same where vLLM's kernel has AMX: even at 64 to 128, 3 times as fast at 256 to 448."""


class CpuPrefill:
    """:class:`mdkv_vllm.kernels.interface.PrefillAttention`, one request after the other.

    Args:
        sinks: of each layer ``[query_heads]``; None where the model has none.
    """

    def __init__(self, sinks: Sequence[torch.Tensor] | None = None) -> None:
        self._sinks = sinks

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> CpuStep:
        """See :class:`mdkv_vllm.kernels.interface.PrefillAttention`."""
        scratch = [_ScratchChunk(chunk, block_table[chunk.row]) for chunk in chunks]
        return CpuStep(scratch, self._sinks)


@dataclass(frozen=True)
class CpuStep:
    """:class:`mdkv_vllm.kernels.interface.PrefillStep`.

    Attributes:
        chunks: the step's chunks.
        sinks: of each layer ``[query_heads]``; None where the model has none.
    """

    chunks: list[_ScratchChunk]
    sinks: Sequence[torch.Tensor] | None

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
        sinks = None if self.sinks is None else self.sinks[layer].float()
        for chunk in self.chunks:
            chunk.attend(query, key, value, kv_cache, scale, sinks, output)


@dataclass
class _ScratchChunk:
    """One request's chunk, its blocks, and the kernel's plan for its lengths, made once."""

    chunk: Chunk
    blocks: torch.Tensor
    schedule: torch.Tensor | None = field(default=None)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """See :class:`mdkv_vllm.kernels.interface.PrefillStep`; sinks ``[query_heads]``.

        The chunk's own keys and values are first rounded to the cache's type: what a token
        sees must not depend on how its prompt was cut into chunks.
        """
        rows = slice(self.chunk.start, self.chunk.stop)
        context, total = self.chunk.context, self.chunk.total
        heads, head_size = key.shape[1:]
        num_blocks = -(-total // SCRATCH_BLOCK)
        scratch = query.new_empty(num_blocks, heads, 2 * SCRATCH_BLOCK, head_size)
        # The kernel computes on whole blocks before it masks: no NaN may lie beyond the end.
        scratch[-1].zero_()
        key_cache, value_cache = scratch.chunk(2, dim=2)
        isa = attention_isa(query.dtype, SCRATCH_BLOCK, head_size)
        slots = torch.arange(total)
        parts = [(key[rows], value[rows], slots[context:])]
        if kv_cache.dtype != query.dtype:
            rounded = (x.to(kv_cache.dtype).to(query.dtype) for x in parts[0][:2])
            parts = [(*rounded, slots[context:])]
        if context:
            loaded = load_tokens(kv_cache, self.blocks, context, query.dtype)
            keys, values = (x.transpose(0, 1).contiguous() for x in loaded)
            parts.append((keys, values, slots[:context]))
        for keys, values, where in parts:
            vllm_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, where, isa)
        lengths = torch.tensor([total], dtype=torch.int32)
        starts = torch.tensor([0, self.chunk.tokens], dtype=torch.int32)
        scratch_blocks = torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0)
        call = _Call(starts, lengths, scratch_blocks, key_cache, value_cache, sinks)
        if self.schedule is None:
            self.schedule = call.schedule(query, isa)
        call.attend(query[rows], scale, output[rows], self.schedule)


@dataclass(frozen=True)
class _Call:
    """A call of vLLM's kernel.

    Attributes:
        query_starts: int32 ``[sequences + 1]``.
        lengths: int32 ``[sequences]``, keys of each.
        block_table: int32 ``[sequences, blocks]``.
        key_cache: ``[blocks, kv_heads, SCRATCH_BLOCK, head_size]``, in a layout of the kernel's.
        value_cache: same.
        sinks: float32 ``[query_heads]``, if there are any.
    """

    query_starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    sinks: torch.Tensor | None = None

    def schedule(self, query: torch.Tensor, isa: str) -> torch.Tensor:
        """The kernel's plan for the lengths; ``query`` is ``[tokens, query_heads, head_size]``."""
        return vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.lengths),
            num_heads=query.shape[1],
            num_kv_heads=self.key_cache.shape[1],
            head_dim=query.shape[2],
            seq_lens=self.lengths,
            dtype=query.dtype,
            query_start_loc=self.query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

    def attend(
        self, query: torch.Tensor, scale: float, output: torch.Tensor, schedule: torch.Tensor
    ) -> None:
        """Write the output of the queries."""
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=output,
            query_start_loc=self.query_starts,
            seq_lens=self.lengths,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=self.sinks,
        )


class CpuHeads:
    """:class:`.head_calls.HeadAttention` by vLLM's kernel: each KV head a request of one head.

    Args:
        dtype: type of the queries.
        head_size: of the model.
    """

    align = SCRATCH_BLOCK
    packed = True

    def __init__(self, dtype: torch.dtype, head_size: int) -> None:
        amx = attention_isa(dtype, SCRATCH_BLOCK, head_size) == "amx"
        self.fewest_tokens = FEWEST_TOKENS_AMX if amx else FEWEST_TOKENS

    def prepare(self, call: HeadCall) -> HeadStep:
        """See :class:`.head_calls.HeadAttention`."""
        return partial(self._attend, call)

    def _attend(
        self, call: HeadCall, query: torch.Tensor, keys: HeadKeys, scale: float
    ) -> torch.Tensor:
        head_size = query.shape[2]
        isa = attention_isa(query.dtype, SCRATCH_BLOCK, head_size)
        starts, lengths = keys.starts.tolist(), keys.lengths.tolist()
        for begin, end, length in zip(starts, starts[1:], lengths, strict=False):
            for side in (keys.keys, keys.values):
                side[begin + length : end] = 0  # see _ScratchChunk.attend
        rows = starts[-1]
        scratch = query.new_empty(rows // SCRATCH_BLOCK, 1, 2 * SCRATCH_BLOCK, head_size)
        key_cache, value_cache = scratch.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            keys.keys[:rows].unsqueeze(1), keys.values[:rows].unsqueeze(1),
            key_cache, value_cache, torch.arange(rows), isa,
        )  # fmt: skip
        first = keys.starts[:-1] // SCRATCH_BLOCK
        longest = -(-max(lengths) // SCRATCH_BLOCK)
        table = first[:, None] + torch.arange(longest, dtype=torch.int32)
        # Behind a sequence's end, entries are not looked at.
        request = _Call(call.query_starts, keys.lengths, table, key_cache, value_cache)
        result = torch.empty_like(query)
        request.attend(query, scale, result, request.schedule(query, isa))
        return result
