"""Attention in which every KV head is a sequence of its own.

A lease keeps other tokens in every layer and KV head. So a chunk behind leases is as many sequences
as there are KV heads, each with one KV head and its group of query heads:

    keys | kept by the leases, in any order | full, from the last lease to the chunk | chunk |

They are read back to scratch memory, layer by layer and some sequences at a time. How many are kept
is known to the device alone, which is not waited for: the host plans with a span's full length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch.nn.functional import pad

from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.kernels.interface import Chunk, LeaseReader, ReadConfig, Sources
from mdkv_vllm.plugin.prefill.chunks import on_device, read_page_tables, runs_on_device

SCRATCH_BYTES = 256 << 20
"""Keys and values that are read back at a time, but for a sequence which alone has more."""
FEWEST_TOKENS = 16
"""Of a chunk on GPUs, an estimate: reading back writes and reads a key that decoding only reads,
but decoding does so once per query."""
MAX_ALIGN = 128
"""Rows that any attention aligns sequences to, at most."""


@dataclass(frozen=True)
class HeadKeys:
    """A layer's keys of some sequences.

    Attributes:
        keys: ``[rows, head_size]``, each sequence's side by side; any bytes between.
        values: same.
        starts: int32 ``[sequences + 1]``, rows at which each begins; its end may be later.
        lengths: int32 ``[sequences]``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class HeadCall:
    """Sequences that go through attention together.

    Attributes:
        counts: queries of each.
        most_keys: keys of the longest at most.
        query_starts: int32 ``[sequences + 1]``, where the queries of each begin.
        tokens: int64 ``[queries]``, their tokens in the batch.
        heads: int64 ``[queries]``, their KV heads.
        rows: of scratch memory.
        starts: int32 ``[layers, sequences + 1]``, see :class:`HeadKeys`.
        lengths: int32 ``[layers, sequences]``.
        sources: what is read.
        targets: int32 ``[layers, sources]``, where to.
    """

    counts: tuple[int, ...]
    most_keys: int
    query_starts: torch.Tensor
    tokens: torch.Tensor
    heads: torch.Tensor
    rows: int
    starts: torch.Tensor
    lengths: torch.Tensor
    sources: Sources
    targets: torch.Tensor

    def read(self, reader: LeaseReader, layer: int, like: torch.Tensor) -> HeadKeys:
        """Read a layer's keys and values, in the type of ``like``."""
        keys, values = like.new_empty(2, self.rows, like.shape[-1])
        reader.read(layer, self.sources, self.targets[layer], keys, values)
        return HeadKeys(keys, values, self.starts[layer], self.lengths[layer])


class HeadStep(Protocol):
    """Attention of the sequences of a call, prepared once for all layers."""

    def __call__(self, query: torch.Tensor, keys: HeadKeys, scale: float) -> torch.Tensor:
        """Attend in one layer.

        A sequence's last query sees all of its keys, the one before it one less, and so on.

        Args:
            query: ``[queries, group, head_size]``, contiguous.
            keys: of the layer.
            scale: factor of the scores.

        Returns:
            Shape and type of the query.
        """
        ...


class HeadAttention(Protocol):
    """Attention of sequences that have one KV head each.

    Attributes:
        align: multiple of rows at which sequences begin.
        packed: whether a sequence begins where the one before ends; otherwise all of them are
            apart by the same number of rows.
        fewest_tokens: of a chunk; a smaller one costs less by the decode kernel, token by token.
    """

    align: int
    packed: bool
    fewest_tokens: int

    def prepare(self, call: HeadCall) -> HeadStep:
        """Prepare a call."""
        ...


def scratch_bytes(
    layout: LeaseLayout, dtype: torch.dtype, group: int, max_tokens: int, step_tokens: int
) -> int:
    """Bytes that a layer of a step takes at most for a moment, beside its queries and outputs.

    Args:
        layout: what leases look like.
        dtype: type of queries.
        group: query heads per KV head.
        max_tokens: of a request.
        step_tokens: query tokens of a step.
    """
    vector = layout.geometry.head_size * dtype.itemsize
    one = 2 * vector * (max_tokens + MAX_ALIGN)
    # Queries side by side, and what attention makes of them.
    rows = 2 * vector * group * layout.num_kv_heads * step_tokens
    return max(one, SCRATCH_BYTES) + rows


def plan_calls(
    chunks: Sequence[Chunk],
    block_table: torch.Tensor,
    config: ReadConfig,
    dtype: torch.dtype,
    heads: HeadAttention,
) -> list[HeadCall]:
    """Plan chunks with leases; nothing is read from the device.

    Args:
        chunks: all of them with leases.
        block_table: int32 ``[rows, max_blocks]``.
        config: the model.
        dtype: of scratch memory.
        heads: what attends.
    """
    layout = config.layout
    tables = read_page_tables(config, chunks, block_table)
    kept = tables[..., 0].sum(-1, dtype=torch.int32)
    # Tokens of the leases before each, over all chunks: [leases + 1, layers, kv_heads].
    before = pad(kept.cumsum(0, dtype=torch.int32), (0, 0, 0, 0, 1, 0))
    row_bytes = 2 * layout.geometry.head_size * dtype.itemsize
    most_rows = SCRATCH_BYTES // row_bytes
    return [
        _Call(some, width, chunks, block_table, layout).plan(before, heads)
        for some, width in _calls(chunks, layout.num_kv_heads, most_rows, heads.align)
    ]


def _calls(
    chunks: Sequence[Chunk], kv_heads: int, most_rows: int, align: int
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Chunks and KV heads that go together, and rows for each of them."""
    some: list[tuple[int, int]] = []
    width = 0
    for index, chunk in enumerate(chunks):
        needed = -(-chunk.total // align) * align
        for head in range(kv_heads):
            wider = max(width, needed)
            if some and (len(some) + 1) * wider > most_rows:
                yield some, width
                some, wider = [], needed
            some.append((index, head))
            width = wider
    yield some, width


class _Call:
    """A :class:`HeadCall` in the making.

    Args:
        some: its sequences: a chunk and a KV head.
        width: rows that each has at most.
        chunks: the step's.
        block_table: int32 ``[rows, max_blocks]``.
        layout: what leases look like.
    """

    def __init__(
        self,
        some: list[tuple[int, int]],
        width: int,
        chunks: Sequence[Chunk],
        block_table: torch.Tensor,
        layout: LeaseLayout,
    ) -> None:
        self._some, self._width = some, width
        self._chunks = [chunks[index] for index, _ in some]
        self._block_table = block_table
        self._block_size = layout.geometry.block_size
        # Where the leases of each chunk begin among all.
        starts = [0, *accumulate(len(chunk.leases) for chunk in chunks)]
        self._first = [starts[index] for index, _ in some]
        self._end = [starts[index + 1] for index, _ in some]

    def _ints(self, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return on_device(numbers, dtype, self._block_table.device)

    def plan(self, before: torch.Tensor, attention: HeadAttention) -> HeadCall:
        """The call.

        Args:
            before: int32 ``[leases + 1, layers, kv_heads]``, tokens kept by the leases before each.
            attention: what attends.
        """
        heads = self._ints([head for _, head in self._some])
        first, end = self._ints(self._first), self._ints(self._end)
        full = self._ints([self._full_tokens(chunk) for chunk in self._chunks], torch.int32)
        # [sequences, layers]
        behind = before[first, :, heads]
        kept = before[end, :, heads] - behind
        lengths = (kept + full[:, None]).T.contiguous()
        starts = self._starts(lengths, attention)
        fields, owners, leases = self._sources()
        owner, lease = self._ints(owners), self._ints(leases)
        # Of a request's full tokens, `lease` is the one behind its last.
        targets = starts[:, owner] + (before[lease, :, heads[owner]] - behind[owner]).T
        table = self._ints([number for source in fields for number in source], torch.int32)
        counts = tuple(chunk.tokens for chunk in self._chunks)
        tokens = [(chunk.start, chunk.stop) for chunk in self._chunks]
        return HeadCall(
            counts=counts,
            most_keys=max(chunk.total for chunk in self._chunks),
            query_starts=self._ints([0, *accumulate(counts)], torch.int32),
            tokens=runs_on_device(tokens, self._block_table.device),
            heads=heads.repeat_interleave(self._ints(counts), output_size=sum(counts)),
            rows=len(self._some) * self._width,
            starts=starts,
            lengths=lengths,
            sources=Sources(
                self._block_table,
                table.view(len(fields), -1),
                max(source[3] - source[2] for source in fields),
            ),
            targets=targets.contiguous(),
        )

    def _full_tokens(self, chunk: Chunk) -> int:
        """Tokens behind the last lease, the chunk's own among them."""
        return chunk.total - chunk.leases[-1][1] * self._block_size

    def _starts(self, lengths: torch.Tensor, attention: HeadAttention) -> torch.Tensor:
        """Rows at which sequences begin: int32 ``[layers, sequences + 1]``."""
        layers, count = lengths.shape
        if not attention.packed:
            ends = self._ints([i * self._width for i in range(count + 1)], torch.int32)
            return ends.expand(layers, -1)
        align = attention.align
        rows = (lengths + (align - 1)) // align * align if align > 1 else lengths
        return pad(rows.cumsum(1, dtype=torch.int32), (1, 0))

    def _sources(self) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
        """Fields of :class:`Sources`, and of each the sequence and the lease, among all chunks'."""
        fields: list[tuple[int, ...]] = []
        owners: list[int] = []
        leases: list[int] = []
        for number, ((_, head), chunk) in enumerate(zip(self._some, self._chunks, strict=True)):
            for place, (first, end) in enumerate(chunk.leases):
                fields.append((chunk.row, head, first, end, 0))
                leases.append(self._first[number] + place)
            tail = chunk.leases[-1][1]
            last = -(-chunk.total // self._block_size)
            fields.append((chunk.row, head, tail, last, self._full_tokens(chunk)))
            leases.append(self._end[number])
            owners += [number] * (len(chunk.leases) + 1)
        return fields, owners, leases
