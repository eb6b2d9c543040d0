"""The queries behind segments' boundaries, which score their tokens: captured in two ways.

A step that runs eagerly copies them as its layers run (:class:`.metadata.Capture`). A step of
requests that generate may be replayed from a CUDA graph, and some of its tokens may be in a window:
the graph keeps the queries of every such step, and the windows' are taken from there after it.

Queries of drafts are captured like others. Where a draft is rejected, the token that stands in its
place is computed before its segment is ripe, and its query replaces the draft's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mdkv_vllm.core.segment import Segment
from mdkv_vllm.plugin.worker_runtime.metadata import Capture, MixedDimMetadata
from mdkv_vllm.plugin.worker_runtime.request_table import HeldRequest
from mdkv_vllm.policy import Policy


@dataclass(frozen=True)
class _RecentQueries:
    """Window queries that the last step left among its recent ones."""

    held: HeldRequest
    segment: Segment
    at: int
    token: int
    count: int


class QueryWindow:
    """Captures the window queries of all segments.

    Args:
        policy: the settings applied to the model.
        num_query_heads: query heads per layer on this rank.
        query_dtype: their type.
        graph_tokens: the largest batch that a CUDA graph holds; 0 without graphs.
        device: where the queries are.
    """

    def __init__(
        self,
        policy: Policy,
        num_query_heads: int,
        query_dtype: torch.dtype,
        graph_tokens: int,
        device: torch.device,
    ) -> None:
        layers, head_size = policy.num_layers, policy.geometry.head_size
        self.shape = (layers, num_query_heads, policy.config.window, head_size)
        # Kept as computed where the kernels take them so.
        self.dtype = query_dtype if device.type == "cuda" else torch.float32
        self._recent = torch.zeros(
            layers, graph_tokens, num_query_heads, head_size, dtype=query_dtype, device=device
        )
        self._from_recent: list[_RecentQueries] = []

    @property
    def graph_tokens(self) -> int:
        """The largest batch whose queries are kept."""
        return self._recent.shape[1]

    def recent(self, layer: int, tokens: int) -> torch.Tensor | None:
        """Where a layer's queries are to be kept, ``[tokens, query_heads, head_size]``."""
        return self._recent[layer, :tokens] if tokens else None

    def bytes_of(self, segments: int) -> int:
        """Bytes of the windows of as many segments."""
        return segments * math.prod(self.shape) * self.dtype.itemsize

    def note(
        self,
        held: HeldRequest,
        metadata: MixedDimMetadata,
        start: int,
        context: int,
        length: int,
    ) -> None:
        """See to it that the window queries among a request's tokens are captured.

        Args:
            held: the request.
            metadata: the step's; captures are added to it.
            start: the request's first query token in the batch.
            context: tokens before it.
            length: tokens up to the end of the step.
        """
        for segment in held.unripe(length):
            first, last = max(context, segment.window_start), min(length, segment.ripe_at)
            if first >= last:
                continue
            if segment not in held.windows:
                device = self._recent.device
                held.windows[segment] = torch.zeros(self.shape, dtype=self.dtype, device=device)
            at, token = first - segment.window_start, start + first - context
            if metadata.recent:
                self._from_recent.append(_RecentQueries(held, segment, at, token, last - first))
            else:
                window = held.windows[segment]
                metadata.captures.append(Capture(window, at, token, last - first))

    def collect(self) -> None:
        """Take what the last step left among its recent queries."""
        for query in self._from_recent:
            window = query.held.windows.get(query.segment)
            if window is not None:
                recent = self._recent[:, query.token : query.token + query.count]
                window[:, :, query.at : query.at + query.count] = recent.transpose(1, 2)
        self._from_recent = []
