"""Decode attention over leases and full-dimension tails on a GPU.

Three launches with grids that depend on shapes alone, and no synchronisation, so that a CUDA
graph can hold them (run every batch size once before, to compile):

1. ``prepare_units`` brings every query into the formats' spaces, once, keeps it as it is for
   callers that ask for it, and writes down what every unit (a query, in one KV head) holds.
2. ``attend_split`` shares every unit's pages among programs.
3. ``merge_parts`` merges the programs' parts and rotates back, once per space.

Bytes of a layer's step: every page of the lists and the tail once, block ids and page table
beside them (some 4 bytes a page), and per part and query head ``rank + 1`` floats written and
read again: some 2 % for a part of ``MIN_PAGES_FULL`` pages of 8 KiB and a group of 4 heads of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.kernels.gpu_decode import GpuDecode, basis_in_use
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig

from .addresses import EXTENT_WORDS, FIRST_LIST
from .attend import attend_split
from .merge import merge_parts
from .prepare import prepare_units
from .shapes import DecodeShape
from .splits import STAGES, SplitPlan, resident_programs

LOG2_E = 1.4426950408889634

MERGE_ROWS = 16
"""Splits that the merge reads at a time."""


class TritonDecode(GpuDecode):
    """:class:`mdkv_vllm.kernels.interface.DecodeKernel` in Triton; multiplies in the cache's type.

    Nothing is checked on the device: ids and lengths have to be right. One workspace serves all
    layers, one call at a time.

    Args:
        config: the model.
        programs: as in :meth:`.SplitPlan.of`; None for what the device holds at once.

    Raises:
        ValueError: the basis has fewer directions than a format reads.
    """

    def __init__(self, config: DecodeConfig, programs: int | None = None) -> None:
        super().__init__(config)
        device = config.kv_cache.device
        basis, rank = basis_in_use(config)
        self._basis_keys, self._basis_values = basis.rows(device)
        self._shape = DecodeShape(config.layout, config.group, rank, config.max_leases)
        programs = programs or resident_programs(self._shape, device)
        self._workspace = _Workspace.allocate(self._shape, config.max_queries, device, programs)

    def scratch(self) -> tuple[torch.Tensor, ...]:
        """See :class:`mdkv_vllm.kernels.interface.DecodeKernel`."""
        space = self._workspace
        return space.rotated, space.records, space.extents, space.part_out, space.part_lse

    def _launch(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        recent: torch.Tensor | None,
    ) -> None:
        config, shape, space = self._config, self._shape, self._workspace
        queries, heads = query.shape[0], shape.num_kv_heads
        plan = SplitPlan.of(queries, heads, space.programs)
        pages = config.kv_cache.view(torch.uint8)
        table = batch.block_table, batch.block_table.stride(0)
        prepare_units[(queries, heads * (shape.group + 1))](
            query,
            query.stride(0),
            query.stride(1),
            pages,
            *table,
            batch.query_rows,
            batch.lengths,
            batch.leases,
            layer,
            self._basis_keys[layer],
            space.rotated,
            query if recent is None else recent,
            space.records,
            space.extents,
            SHAPE=shape,
            KEEP=recent is not None,
            num_warps=1,
        )
        attend_split[(plan.splits, heads, queries)](
            query,
            query.stride(0),
            query.stride(1),
            space.rotated,
            pages,
            *table,
            space.records,
            space.extents,
            layer,
            config.scale * LOG2_E,
            plan.min_pages,
            space.part_out,
            space.part_lse,
            SHAPE=shape,
            STAGES=STAGES,
            num_warps=shape.num_warps,
        )
        merge_parts[(heads * shape.group, queries)](
            space.part_out,
            space.part_lse,
            pages,
            *table,
            space.records,
            layer,
            self._basis_values[layer],
            output,
            output.stride(0),
            output.stride(1),
            space.part_lse if lse is None else lse,
            SHAPE=shape,
            SPLITS=plan.splits,
            ROWS=min(plan.splits, MERGE_ROWS),
            HAS_LSE=lse is not None,
            num_warps=4,
        )


@dataclass(frozen=True)
class _Workspace:
    """Memory between the kernels, for batches up to a size. Its contents need no clearing.

    Attributes:
        rotated: float32, queries in the formats' spaces.
        records: int32, what units hold; see ``addresses.py``.
        extents: int32, where it is in each lease; same.
        part_out: float32, parts of outputs.
        part_lse: float32, base-2 logarithms of the parts' sums of weights.
        programs: as in :meth:`.SplitPlan.of`.
    """

    rotated: torch.Tensor
    records: torch.Tensor
    extents: torch.Tensor
    part_out: torch.Tensor
    part_lse: torch.Tensor
    programs: int

    @classmethod
    def allocate(
        cls, shape: DecodeShape, max_queries: int, device: torch.device, programs: int
    ) -> _Workspace:
        """Allocate for batches of up to ``max_queries`` queries, padding included."""
        heads = shape.num_kv_heads
        units_and_splits = [
            (queries * heads, SplitPlan.of(queries, heads, programs).splits)
            for queries in range(1, max_queries + 1)
        ]
        slots = max(units * (splits + shape.num_lists) for units, splits in units_and_splits)
        parts = max(units * splits for units, splits in units_and_splits)

        def floats(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.float32, device=device)

        def words(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32, device=device)

        most = max_queries * heads
        return cls(
            floats(most * shape.group * shape.rotated_width),
            words(most * (FIRST_LIST.value + shape.num_lists)),
            words(most * shape.num_lists * EXTENT_WORDS.value * shape.max_leases),
            floats(slots * shape.part_floats),
            floats(parts * shape.group * shape.num_parts),
            programs,
        )
