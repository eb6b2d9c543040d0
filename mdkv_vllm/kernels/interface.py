"""What each kind of kernel does, whatever it is written in.

Decode attention: :class:`DecodeKernel`. Attention of prompts: :class:`PrefillAttention`, which has
what leases keep read back by a :class:`LeaseReader`.
Compression: :class:`mdkv_vllm.core.kernels.CompressionKernels`, which stands in ``core`` beside its
specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.layout import LeaseLayout

GPU_HEAD_SIZES = (64, 80, 96, 128, 256)
"""Dimensions of a head that GPU kernels are built for: ``kHeadSizes`` of csrc/cuda/tables.cuh."""


@dataclass(frozen=True)
class DecodeConfig:
    """What every decode kernel of a model is made from.

    Attributes:
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``,
            contiguous and 16-byte aligned.
        layout: what leases look like.
        group: query heads per KV head.
        basis: the calibrated basis, None where none is used or each prompt has its own.
        scale: factor of the attention scores.
        max_queries: queries of one launch at most; larger batches take several.
        max_leases: leases of one request at most; 1 where the basis is the prompt's own, since a
            query is rotated once.

    Raises:
        ValueError: requests have prompt bases of their own and several leases.
    """

    kv_cache: torch.Tensor
    layout: LeaseLayout
    group: int
    basis: Basis | None
    scale: float
    max_queries: int
    max_leases: int = 1

    def __post_init__(self) -> None:
        if self.max_leases < 1:
            raise ValueError(f"max_leases: {self.max_leases}; expected at least 1")
        if self.layout.prompt_basis_rank and self.max_leases > 1:
            raise ValueError(
                f"max_leases: {self.max_leases}; a prompt's own basis (rank "
                f"{self.layout.prompt_basis_rank}) allows one lease per request, because its "
                "queries are rotated once"
            )


@dataclass(frozen=True)
class DecodeBatch:
    """Whose tokens each query of a step attends to, the same in every layer.

    Attributes:
        block_table: int32 ``[rows, max_blocks]``, last dimension contiguous.
        query_rows: int32 ``[queries]``, the block-table row of each query.
        lengths: int32 ``[queries]``, keys each query sees, counted from position 0; a query
            of length 0 (padding) gives zeros, and its row is not looked at.
        leases: int32 ``[rows, max_leases, 2]``, contiguous: of each lease of a row, in the order of
            their tokens, its first block and the one behind its last; 0, 0 behind the last lease.
            What follows the last lease's blocks is at full dimension.
    """

    block_table: torch.Tensor
    query_rows: torch.Tensor
    lengths: torch.Tensor
    leases: torch.Tensor

    def queries(self, some: slice) -> DecodeBatch:
        """The batch with some of its queries alone."""
        return DecodeBatch(self.block_table, self.query_rows[some], self.lengths[some], self.leases)


class DecodeKernel(Protocol):
    """Attention of single-token queries over leases and full-dimension tokens."""

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
        recent: torch.Tensor | None = None,
    ) -> None:
        """Attend in one layer, without waiting for the device.

        Args:
            query: ``[queries, q_heads, head_size]``, last dimension contiguous.
            layer: the layer to attend in.
            batch: whose tokens are attended to.
            output: written, shape and type of the query, last dimension contiguous.
            lse: written where given, float32 ``[queries, q_heads]``: natural logarithms of the
                sums of weights, minus infinity for padding.
            recent: written where given, contiguous, shape and type of the query: the queries as
                they are.
        """
        ...

    def scratch(self) -> Sequence[torch.Tensor]:
        """Memory whose contents before a call must not matter, for tests to fill with NaN."""
        ...


MakeDecode = Callable[[DecodeConfig], DecodeKernel]


@dataclass(frozen=True)
class ReadConfig:
    """What every reader of leases of a model is made from.

    Attributes:
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``,
            contiguous and 16-byte aligned.
        layout: what leases look like.
        basis: the calibrated basis, None where none is used or each prompt has its own.
    """

    kv_cache: torch.Tensor
    layout: LeaseLayout
    basis: Basis | None


SOURCE_FIELDS = 5
"""Columns of :attr:`Sources.fields`."""


@dataclass(frozen=True)
class Sources:
    """Tokens of some KV heads that are read side by side, the same in every layer.

    Attributes:
        block_table: int32 ``[rows, max_blocks]``, last dimension contiguous.
        fields: int32 ``[sources, SOURCE_FIELDS]``, contiguous: row of the block table, KV head,
            first block, the one behind the last, and how many full-dimension tokens are read from
            the first block on; 0 for a lease, whose page table says what it keeps.
        most_blocks: blocks of the longest source.
    """

    block_table: torch.Tensor
    fields: torch.Tensor
    most_blocks: int


class LeaseReader(Protocol):
    """Reads tokens back that leases keep, and full-dimension ones with them."""

    def read(
        self,
        layer: int,
        sources: Sources,
        targets: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Read one layer's tokens in the model's space, without waiting for the device.

        The tokens of a lease come in the order of its lists, see
        :func:`mdkv_vllm.core.reference.read_lease`.

        Args:
            layer: the layer to read.
            sources: what is read.
            targets: int32 ``[sources]``, contiguous: the row of keys and values to which each
                source's first token goes; the others follow. Sources must not overlap.
            keys: written, ``[rows, head_size]``, contiguous: float32, float16 or bfloat16.
            values: written, same.
        """
        ...


MakeReader = Callable[[ReadConfig], LeaseReader]


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens of one request, attending to their context and to each other.

    Attributes:
        start: first query token in the batch.
        stop: one past the last.
        context: tokens before them, whether their keys are kept or not.
        row: the request's row of the block table.
        leases: of each lease of the request, in the order of their tokens, its first block and the
            one behind its last; their tokens come before the chunk.
    """

    start: int
    stop: int
    context: int
    row: int
    leases: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.stop - self.start

    @property
    def total(self) -> int:
        """Position behind the last of them."""
        return self.context + self.tokens


class PrefillStep(Protocol):
    """The chunks of one step, prepared once for all layers."""

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
        """Causal attention of every chunk to its context and itself, in one layer.

        The chunks' own keys and values are in the cache already, at full dimension like what is
        between their request's last lease and them. Of a lease, kept tokens alone are seen.

        Args:
            query: ``[tokens, query_heads, head_size]``, the whole batch.
            key: ``[tokens, kv_heads, head_size]``, as computed, not rounded to the cache's type.
            value: ``[tokens, kv_heads, head_size]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` view of the layer.
            layer: its index, by which leases are read.
            scale: factor of the scores.
            output: like ``query``; the chunks' rows are written.
        """
        ...


class PrefillAttention(Protocol):
    """An implementation of attention of prompts."""

    def prepare(self, chunks: Sequence[Chunk], block_table: torch.Tensor) -> PrefillStep:
        """Prepare a step.

        Args:
            chunks: in the order of their tokens.
            block_table: int32 ``[rows, max_blocks]``.
        """
        ...
