"""What compressions did: read once the device has done them, counted, and remembered."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.request import CompressionRequest

_RECENT = 64
"""Compressions remembered for reports."""


@dataclass(frozen=True)
class CompressionReport:
    """What one compression did.

    Attributes:
        request_id: vLLM's id.
        prompt_tokens: length of its prompt.
        part: of what the segment is, ``prompt`` or ``answer``.
        first_token: position of the segment's first token.
        end_token: the position behind its last.
        full_blocks: blocks from its first to that of the last token that its compression read, the
            prompt's last for a prompt's last segment, before.
        kept_blocks: of those after.
        lease_blocks: blocks of the lease.
        kept_share: bytes kept of those tokens over their full bytes.
        tokens: per format, tokens kept over all layers and heads, dropped ones included.
        seconds: how long it took, on a GPU by the GPU's own clock.
    """

    request_id: str
    prompt_tokens: int
    part: str
    first_token: int
    end_token: int
    full_blocks: int
    kept_blocks: int
    lease_blocks: int
    kept_share: float
    tokens: dict[str, int]
    seconds: float


@dataclass
class Totals:
    """Running totals since start-up."""

    prompts: int = 0
    segments: int = 0
    blocks_returned: int = 0
    seconds: float = 0.0
    recent: list[CompressionReport] = field(default_factory=list)

    def add(self, report: CompressionReport) -> None:
        """Count one compression."""
        self.prompts += report.part == "prompt" and report.first_token == 0
        self.segments += 1
        self.blocks_returned += report.full_blocks - report.kept_blocks
        self.seconds += report.seconds
        self.recent = [*self.recent[-_RECENT + 1 :], report]


class Stopwatch:
    """Time of work on a device, in one piece or several; reading it early waits.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        """Work is about to be given to the device."""
        self._marks.append(self._mark())

    def stop(self) -> None:
        """It has been given to the device."""
        self._marks.append(self._mark())

    @property
    def finished(self) -> bool:
        """Whether the device has done all of it."""
        return not self._on_gpu or self._marks[-1].query()

    @property
    def seconds(self) -> float:
        """How long the work took."""
        pieces = zip(self._marks[::2], self._marks[1::2], strict=True)
        if not self._on_gpu:
            return sum(last - first for first, last in pieces)
        self._marks[-1].synchronize()
        return sum(first.elapsed_time(last) for first, last in pieces) / 1000

    def _mark(self):  # type: ignore[no-untyped-def] # noqa: ANN202
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class CompressionRecord:
    """A compression given to the device, whose numbers may not be there yet.

    Attributes:
        request_id: vLLM's id.
        resident: whether the request still holds its lease.

    Args:
        request: whose segment it is.
        segment: which one.
        tokens: int64 ``[layers, kv_heads, formats]`` on the device, tokens of each list.
        watch: times it; stopped here.
    """

    def __init__(
        self,
        request: CompressionRequest,
        segment: Segment,
        tokens: torch.Tensor,
        watch: Stopwatch,
    ) -> None:
        self.request_id, self.resident = request.request_id, True
        self._request, self._segment, self._watch = request, segment, watch
        totals = tokens.sum((0, 1))
        self._tokens = torch.empty(
            totals.shape, dtype=totals.dtype, pin_memory=totals.device.type == "cuda"
        )
        self._tokens.copy_(totals, non_blocking=True)
        watch.stop()

    @property
    def finished(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._watch.finished

    def read(self, layout: LeaseLayout) -> CompressionReport:
        """The report, after waiting for the device if need be."""
        segment, seconds = self._segment, self._watch.seconds
        names = [f.name for f in layout.formats.formats]
        per_format = dict(zip(names, self._tokens.tolist(), strict=True))
        held = segment.span_tokens * layout.pages_per_block
        per_format["drop"] = held - sum(per_format.values())
        full = segment.loaded_end - segment.first_block
        freed = segment.num_freed_blocks
        return CompressionReport(
            self.request_id,
            self._request.prompt_tokens,
            segment.part,
            segment.first_token,
            segment.end_token,
            full,
            full - freed,
            segment.num_lease_blocks,
            1 - freed * segment.block_size / segment.loaded_tokens,
            per_format,
            seconds,
        )
