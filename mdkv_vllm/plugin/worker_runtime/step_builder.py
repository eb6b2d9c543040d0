"""Turns vLLM's batch into what every layer does in the step."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from mdkv_vllm.kernels.interface import Chunk
from mdkv_vllm.plugin.prefill.chunks import on_device
from mdkv_vllm.plugin.prefill.leased import LeasedPrefill
from mdkv_vllm.plugin.rows import BatchOrder
from mdkv_vllm.plugin.worker_runtime.metadata import (
    Decode,
    MixedDimMetadata,
    StepBuffers,
    StepLimits,
)
from mdkv_vllm.plugin.worker_runtime.query_window import QueryWindow
from mdkv_vllm.plugin.worker_runtime.request_table import RequestTable


class _Step:
    """One step's metadata in the making."""

    def __init__(self, batch: CommonAttentionMetadata, limits: StepLimits) -> None:
        self.batch = batch
        # No row is longer than one of a request that generates: may be replayed from a CUDA graph.
        self.decodes = batch.max_query_len <= limits.decode_tokens
        self.metadata = MixedDimMetadata()
        if self.decodes and batch.num_actual_tokens <= limits.graph_tokens:
            self.metadata.recent = batch.num_actual_tokens
        self.chunks: list[Chunk] = []
        self.tokens: list[int] = []
        self.token_rows: list[int] = []
        self.token_lengths: list[int] = []
        self.leases: dict[int, list[tuple[int, int]]] = {}

    def decode(self, row: int, start: int, stop: int, context: int) -> None:
        """Let a row's query tokens go through the decode kernel one by one."""
        self.tokens += range(start, stop)
        self.token_rows += [row] * (stop - start)
        self.token_lengths += range(context + 1, context + 1 + stop - start)

    def pad(self) -> None:
        """Rows that pad a CUDA graph's batch have no request, and see nothing."""
        padding = self.batch.num_actual_tokens - len(self.tokens)
        self.tokens = list(range(self.batch.num_actual_tokens))
        self.token_rows += [0] * padding
        self.token_lengths += [0] * padding

    def where(self, device: torch.device) -> torch.Tensor | slice:
        """The decoded tokens in the batch."""
        if self.tokens[-1] - self.tokens[0] + 1 == len(self.tokens):
            return slice(self.tokens[0], self.tokens[-1] + 1)
        return on_device(self.tokens, torch.int64, device)


class StepBuilder:
    """Sorts a step's requests into prefills and decodes, and notes segments that may ripen in it.

    Args:
        table: the requests.
        window: captures the queries that score segments.
        prefill: attention of prompts.
        order: reads the running batch.
        limits: the largest step.
        device: where the cache is.
    """

    def __init__(
        self,
        table: RequestTable,
        window: QueryWindow,
        prefill: LeasedPrefill,
        order: BatchOrder,
        limits: StepLimits,
        device: torch.device,
    ) -> None:
        self._table = table
        self._window = window
        self._prefill = prefill
        self._order = order
        self._device = device
        self._limits = limits
        self._buffers = StepBuffers(limits, device)

    def build(self, batch: CommonAttentionMetadata, stepping: bool) -> MixedDimMetadata:
        """Build one step's metadata, shared by all layers.

        Args:
            batch: vLLM's.
            stepping: whether its rows are requests; vLLM's warm-up makes them up.
        """
        step = _Step(batch, self._limits)
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        assert batch.seq_lens_cpu_upper_bound is not None
        lengths = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist()
        ids = self._order.request_ids(batch)[: batch.num_reqs] if stepping else []
        for row, request_id in enumerate(ids):
            self._add(step, request_id, row, starts[row], starts[row + 1], lengths[row])
        if step.decodes:
            step.pad()
        if step.tokens:
            loaded = self._buffers.load(
                batch.block_table_tensor, step.token_rows, step.token_lengths, step.leases
            )
            step.metadata.decode = Decode(step.where(self._device), loaded)
        if step.chunks:
            table = batch.block_table_tensor
            step.metadata.prefill = self._prefill.prepare(step.chunks, table)
        return step.metadata

    def _add(
        self, step: _Step, request_id: str, row: int, start: int, stop: int, length: int
    ) -> None:
        held, context = self._table[request_id], length - (stop - start)
        if held.leases:
            step.leases[row] = held.leases
        self._window.note(held, step.metadata, start, context, length)
        # If every draft is accepted. The table's rows belong to others in the next step.
        may_ripen = [one for one in held.unripe(length) if one.ripe_at <= length]
        if may_ripen:
            held.blocks = step.batch.block_table_tensor[row, : may_ripen[-1].loaded_end].clone()
        fewest = self._prefill.fewest_tokens if held.leases else 0
        if stop - start < max(fewest, self._limits.decode_tokens + 1):
            step.decode(row, start, stop, context)
        else:
            step.chunks.append(Chunk(start, stop, context, row, tuple(held.leases)))
