"""Decode attention over leases and full-dimension tails on a GPU: the entry point.

Three launches with grids that depend on shapes alone, and no synchronisation, so that a CUDA
graph can hold them (run every batch size once before, to compile):

1. ``rotate_queries`` brings every query into the formats' spaces, once, and keeps it as it is for
   callers that ask for it.
2. ``attend_split`` shares every unit's pages (a query's, in one KV head) among programs.
3. ``merge_parts`` merges the programs' parts and rotates back, once per space.

Bytes of a layer's step: every page of the lists and the tail once, block ids and page table
beside them (some 4 bytes a page), and per part and query head ``rank + 1`` floats written and
read again: some 2 % for a part of ``MIN_PAGES_FULL`` pages of 8 KiB and a group of 4 heads of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.layout import LeaseLayout

from .attend import attend_split
from .merge import merge_parts
from .rotate import rotate_queries
from .shapes import DecodeShape
from .splits import STAGES, SplitPlan, resident_programs

LOG2_E = 1.4426950408889634

MERGE_ROWS = 16
"""Splits that the merge reads at a time."""


@dataclass(frozen=True)
class DecodeTables:
    """What :func:`mixed_decode` needs to know of a model; build it once.

    Attributes:
        shape: what kernels are compiled for.
        basis_keys: per layer, float32 ``[kv_heads, rank, head_size]`` on the device; rank 0
            without a calibrated basis.
        basis_values: same.
    """

    shape: DecodeShape
    basis_keys: tuple[torch.Tensor, ...]
    basis_values: tuple[torch.Tensor, ...]

    @classmethod
    def build(
        cls, layout: LeaseLayout, group: int, basis: Basis | None, device: torch.device
    ) -> DecodeTables:
        """Tables of a lease layout and, where formats use one, a calibrated basis.

        Args:
            layout: what leases look like.
            group: query heads per KV head.
            basis: the calibrated basis; None where none is used, or each prompt has its own.
            device: where the arena is.
        """
        if layout.prompt_basis_rank or basis is None:
            basis = Basis.empty(layout.num_layers, layout.num_kv_heads, layout.geometry.head_size)
        rank = layout.prompt_basis_rank or basis.rank
        assert rank >= layout.formats.basis_rank, "the basis has too few directions"
        return cls(
            DecodeShape(layout, group, rank if layout.formats.uses_basis else 0),
            *basis.rows(device),
        )


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory between the kernels, for batches up to a size. Its contents need no clearing.

    One workspace serves all layers of a model, one call at a time.

    Attributes:
        rotated: float32, queries in the formats' spaces.
        part_out: float32, parts of outputs.
        part_lse: float32, base-2 logarithms of the parts' sums of weights.
        programs: as in :meth:`.SplitPlan.of`.
    """

    rotated: torch.Tensor
    part_out: torch.Tensor
    part_lse: torch.Tensor
    programs: int

    @classmethod
    def allocate(
        cls,
        shape: DecodeShape,
        max_queries: int,
        device: torch.device,
        programs: int | None = None,
    ) -> DecodeWorkspace:
        """Allocate for batches of up to ``max_queries`` queries.

        Args:
            shape: what kernels are compiled for.
            max_queries: queries of the largest batch, padding included.
            device: where the arena is.
            programs: as in :meth:`.SplitPlan.of`; None for what the device holds at once.
        """
        programs = programs or resident_programs(shape, device)
        heads = shape.num_kv_heads
        units_and_splits = [
            (queries * heads, SplitPlan.of(queries, heads, programs).splits)
            for queries in range(1, max_queries + 1)
        ]
        slots = max(units * (splits + shape.num_lists) for units, splits in units_and_splits)
        parts = max(units * splits for units, splits in units_and_splits)

        def floats(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.float32, device=device)

        return cls(
            floats(max_queries * heads * shape.group * shape.rotated_width),
            floats(slots * shape.part_floats),
            floats(parts * shape.group * shape.num_parts),
            programs,
        )


def mixed_decode(
    query: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: DecodeTables,
    block_table: torch.Tensor,
    query_rows: torch.Tensor,
    lengths: torch.Tensor,
    leases: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    workspace: DecodeWorkspace,
    lse: torch.Tensor | None = None,
    recent: torch.Tensor | None = None,
) -> None:
    """Attention of single-token queries over leases and full-dimension tokens.

    Nothing is checked on the device: ids and lengths have to be right.

    Args:
        query: ``[queries, q_heads, head_size]``, last dimension contiguous.
        arena: the whole cache, contiguous and 16-byte aligned,
            ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        layer: the layer to attend in.
        tables: the model's formats and bases.
        block_table: int32 ``[rows, max_blocks]``, last dimension contiguous.
        query_rows: int32 ``[queries]``, the block-table row of each query.
        lengths: int32 ``[queries]``, keys each query sees, counted from position 0; a query
            of length 0 (padding) gives zeros, and its row is not looked at.
        leases: int32 ``[rows, 2]``, first lease block and tail block; 0, 0 for no lease.
        scale: factor of the scores.
        output: written, shape and type of the query, last dimension contiguous.
        workspace: memory for at least as many queries.
        lse: written where given, float32 ``[queries, q_heads]``, natural logarithm.
        recent: written where given, contiguous, shape and type of the query: the queries.
    """
    shape = tables.shape
    queries, heads = query.shape[0], shape.num_kv_heads
    if queries == 0:
        return
    plan = SplitPlan.of(queries, heads, workspace.programs)
    pages = arena.view(torch.uint8)
    requests = (block_table, block_table.stride(0), query_rows, lengths, leases)
    if shape.uses_basis or shape.uses_hadamard or recent is not None:
        rotate_queries[(queries, heads * shape.group)](
            query,
            query.stride(0),
            query.stride(1),
            pages,
            *requests,
            layer,
            tables.basis_keys[layer],
            workspace.rotated,
            query if recent is None else recent,
            SHAPE=shape,
            KEEP=recent is not None,
            num_warps=1,
        )
    attend_split[(plan.splits, heads, queries)](
        query,
        query.stride(0),
        query.stride(1),
        workspace.rotated,
        pages,
        *requests,
        layer,
        scale * LOG2_E,
        plan.min_pages,
        workspace.part_out,
        workspace.part_lse,
        SHAPE=shape,
        STAGES=STAGES,
        num_warps=shape.num_warps,
    )
    merge_parts[(heads * shape.group, queries)](
        workspace.part_out,
        workspace.part_lse,
        pages,
        *requests,
        layer,
        tables.basis_values[layer],
        output,
        output.stride(0),
        output.stride(1),
        workspace.part_lse if lse is None else lse,
        SHAPE=shape,
        SPLITS=plan.splits,
        ROWS=min(plan.splits, MERGE_ROWS),
        HAS_LSE=lse is not None,
        num_warps=4,
    )
