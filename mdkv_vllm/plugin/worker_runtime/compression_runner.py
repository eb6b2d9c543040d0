"""Compressions: run between two steps, before the next one's forward pass, counted once done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mdkv_vllm.core.compress import CompressedSegment, Compression, Compressor
from mdkv_vllm.core.prompt import LoadLayer, PagedTokens
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.plugin.kv_cache import load_tokens
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.worker_runtime.reports import CompressionRecord, Stopwatch, Totals
from mdkv_vllm.plugin.worker_runtime.request_table import HeldRequest
from mdkv_vllm.policy import Policy


@dataclass
class _Ripe:
    """A segment that may be compressed, or is being compressed."""

    held: HeldRequest
    segment: Segment
    blocks: torch.Tensor
    watch: Stopwatch
    compression: Compression | None = None

    def steps_left(self, step_tokens: int) -> int:
        """Steps, this one included, until it is due: then the scheduler may free its blocks.

        Args:
            step_tokens: that its request computes in a step at most.
        """
        return max(0, -(-(self.segment.due_at - self.held.computed_tokens) // step_tokens)) + 1

    @property
    def done(self) -> bool:
        """Whether it has been compressed."""
        return self.compression is not None and not self.compression.parts_left


class CompressionRunner:
    """Compresses segments where they lie, each before it is due.

    A segment of an answer has some steps for it: it is compressed by groups of layers, as few a
    step as it takes to have all that are ripe done in time.

    Args:
        policy: the settings applied to the model.
        compressor: compresses a segment.
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        decode_tokens: that a request which generates computes in a step at most.
    """

    def __init__(
        self, policy: Policy, compressor: Compressor, kv_cache: torch.Tensor, decode_tokens: int
    ) -> None:
        self.totals = Totals()
        self._policy = policy
        self._compressor = compressor
        self._kv_cache = kv_cache
        self._decode_tokens = decode_tokens
        self._ripe: list[_Ripe] = []
        self._records: list[CompressionRecord] = []
        self._metrics: WorkerMetrics | None = None

    def start_counting(self, metrics: WorkerMetrics) -> None:
        """Count from here on; what came before was vLLM's warm-up.

        Args:
            metrics: told of every compression and of the requests that are gone.
        """
        self.read_records(wait=True)
        self.totals = Totals()
        self._metrics = metrics

    def add(self, held: HeldRequest, segment: Segment) -> None:
        """Have a segment compressed that is ripe.

        Args:
            held: its request.
            segment: the request's next one; its window is captured.
        """
        assert held.blocks is not None
        blocks = held.blocks[segment.first_block : segment.loaded_end]
        self._ripe.append(_Ripe(held, segment, blocks, Stopwatch(self._kv_cache.device)))

    def run(self, gone: set[str]) -> None:
        """Compress what is due and some of the rest, but nothing of a request that is gone."""
        for record in self._records:
            record.resident &= record.request_id not in gone
        if self._metrics is not None:
            self._metrics.released(gone)
        line = [one for one in self._ripe if one.held.request.request_id not in gone]
        # A request's own stay in their order.
        line.sort(key=lambda one: one.steps_left(self._decode_tokens))
        parts = self._parts_due(line)
        for ripe in line:
            parts = self._advance(ripe, parts)
            if not parts:
                break
        self._ripe = [one for one in line if not one.done]

    def _parts_due(self, line: list[_Ripe]) -> int:
        """Parts of this step: if every step does as many, all are done in time."""
        most = parts = 0
        for ripe in line:
            begun = ripe.compression
            parts += self._compressor.parts if begun is None else begun.parts_left
            most = max(most, -(-parts // ripe.steps_left(self._decode_tokens)))
        return most

    def _advance(self, ripe: _Ripe, parts: int) -> int:
        """Do some parts of a compression, if it has as many; how many of them remain for others."""
        ripe.watch.start()
        if ripe.compression is None:
            tokens = self._tokens(ripe.blocks, ripe.segment.loaded_tokens)
            window = ripe.held.windows.pop(ripe.segment)
            ripe.compression = self._compressor.start(tokens, window, ripe.segment)
        while parts and ripe.compression.parts_left:
            ripe.compression.advance()
            parts -= 1
        if ripe.done:
            self._finish(ripe, ripe.compression.result())
        else:
            ripe.watch.stop()
        return parts

    def _finish(self, ripe: _Ripe, result: CompressedSegment) -> None:
        """Write a lease over the segment's last blocks."""
        held, segment = ripe.held, ripe.segment
        first = segment.first_lease_block - segment.first_block
        lease = ripe.blocks[first : segment.num_blocks].long()
        target = self._kv_cache.view(torch.uint8).flatten(1)
        target[lease] = result.pages.view(segment.num_lease_blocks, -1)
        held.leases.append(segment.lease)
        record = CompressionRecord(held.request, segment, result.tokens, ripe.watch)
        self._records.append(record)

    def warm_up(self, tokens: int, window: torch.Tensor) -> None:
        """Compress whatever lies in one block, as every block of a segment; nothing is written.

        Args:
            tokens: of the longest request; its longest segment and one of an answer are taken.
            window: any queries, as a segment's.
        """
        for segment in self._policy.sample_segments(tokens):
            needed = segment.loaded_end - segment.first_block
            blocks = torch.zeros(needed, dtype=torch.int32, device=self._kv_cache.device)
            load = self._tokens(blocks, segment.loaded_tokens)
            self._compressor.compress(load, window, segment)

    def _tokens(self, blocks: torch.Tensor, tokens: int) -> LoadLayer:
        """A segment's keys and values: where GPU kernels read them, or a layer's copy on CPU."""
        heads = self._policy.num_kv_heads
        if self._compressor.kernels.reads_pages:
            return PagedTokens(self._kv_cache, blocks, tokens, heads)

        def load(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            view = self._kv_cache[:, layer * heads : (layer + 1) * heads]
            return load_tokens(view, blocks, tokens, torch.float32)

        return load

    def read_records(self, wait: bool) -> None:
        """Count the compressions that the device has done.

        Args:
            wait: wait for those that it has not.
        """
        while self._records and (wait or self._records[0].finished):
            record = self._records.pop(0)
            report = record.read(self._policy.layout)
            self.totals.add(report)
            if self._metrics is not None:
                self._metrics.record_compression(report, resident=record.resident)

    def describe(self) -> dict[str, Any]:
        """Totals, and the latest compressions under ``recent``."""
        self.read_records(wait=True)
        return asdict(self.totals)
