"""What a worker knows: what compression made of segments, and how long it took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.tracing import SpanAttributes, instrument_manual

from mdkv_vllm.core.segment import PARTS
from mdkv_vllm.plugin.metrics.recorder import Recorder, current_recorder
from mdkv_vllm.plugin.metrics.table import (
    COMPRESSED_TOKENS,
    COMPRESSION_SECONDS,
    CONFIG_INFO,
    LEASE_BYTES,
    LEASE_USED_BYTES,
)
from mdkv_vllm.policy import Policy

if TYPE_CHECKING:
    from mdkv_vllm.plugin.worker_runtime.reports import CompressionReport

SPAN = "mixeddim.compress"
"""Name of the OpenTelemetry span of one compression."""


class WorkerMetrics:
    """Keeps one worker's numbers.

    Each counts its own layers, heads and bytes; what all workers of an engine see alike (seconds,
    the configuration) is counted by the first.

    Args:
        policy: the settings applied to the model.
        configuration: values of the labels of ``mixeddim:config_info``.
        total_kv_heads: KV heads of the model; more ranks than those hold copies.
        recorder: where to; None for this process's.
    """

    def __init__(
        self,
        policy: Policy,
        configuration: dict[str, str],
        total_kv_heads: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._policy = policy
        self._recorder = recorder or current_recorder()
        self._first = self._recorder.rank == self._recorder.stage == 0
        self._counts_heads = not _holds_copies(self._recorder, total_kv_heads)
        self._leases: dict[str, tuple[float, float]] = {}
        if self._counts_heads:
            for metric in (LEASE_BYTES, LEASE_USED_BYTES):
                self._recorder.declare(metric)
            for name in policy.formats.names:
                for part in PARTS:
                    self._recorder.declare(COMPRESSED_TOKENS, format=name, part=part)
        if self._first:
            self._recorder.declare(COMPRESSION_SECONDS)
            self._recorder.set(CONFIG_INFO, 1, **configuration)

    def record_compression(self, report: CompressionReport, *, resident: bool = True) -> None:
        """Count one compression, now or whenever its numbers arrive.

        Args:
            report: what it did.
            resident: whether the request still holds its lease.
        """
        if self._first:
            self._recorder.observe(COMPRESSION_SECONDS, report.seconds)
            if self._recorder.tracing:
                _export_span(report)
        if not self._counts_heads:
            return
        for name, tokens in report.tokens.items():
            self._recorder.add(COMPRESSED_TOKENS, tokens, format=name, part=report.part)
        if resident:
            self._hold(report.request_id, self._lease_bytes(report))

    def released(self, request_ids: Iterable[str]) -> None:
        """Requests ended or were preempted: their leases are gone."""
        for request_id in request_ids:
            leased, used = self._leases.pop(request_id, (0.0, 0.0))
            self._recorder.add(LEASE_BYTES, -leased)
            self._recorder.add(LEASE_USED_BYTES, -used)

    def _hold(self, request_id: str, sizes: tuple[float, float]) -> None:
        """A request holds another lease."""
        (leased, used), held = sizes, self._leases.get(request_id, (0.0, 0.0))
        self._leases[request_id] = held[0] + leased, held[1] + used
        self._recorder.add(LEASE_BYTES, leased)
        self._recorder.add(LEASE_USED_BYTES, used)

    def _lease_bytes(self, report: CompressionReport) -> tuple[float, float]:
        """Bytes of a lease, and those of its page table, prompt basis and tokens."""
        layout = self._policy.layout
        geometry = layout.geometry
        leased = report.lease_blocks * layout.pages_per_block * geometry.page_bytes
        basis = 2 * layout.prompt_basis_rank * geometry.head_size * geometry.dtype.itemsize
        used = 4 * math.prod(layout.table_shape) + layout.pages_per_block * basis
        used += sum(report.tokens[f.name] * f.bytes_per_token for f in self._policy.formats.formats)
        return leased, used


def _holds_copies(recorder: Recorder, total_kv_heads: int) -> bool:
    """Whether this rank's heads are copies of those of the rank before it."""
    rank, ranks = recorder.rank, recorder.ranks
    return rank > 0 and rank * total_kv_heads // ranks == (rank - 1) * total_kv_heads // ranks


def _export_span(report: CompressionReport) -> None:
    end = time.time_ns()
    instrument_manual(
        SPAN,
        start_time=end - int(report.seconds * 1e9),
        end_time=end,
        attributes={
            SpanAttributes.GEN_AI_REQUEST_ID: report.request_id,
            "mixeddim.prompt_tokens": report.prompt_tokens,
            "mixeddim.part": report.part,
            "mixeddim.first_token": report.first_token,
            "mixeddim.end_token": report.end_token,
            "mixeddim.full_blocks": report.full_blocks,
            "mixeddim.kept_blocks": report.kept_blocks,
        },
    )
