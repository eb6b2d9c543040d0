"""The last queries of prompts, which compression scores tokens by: captured in two ways.

A step that runs eagerly copies them as its layers run (:class:`.metadata.Capture`). A step of
single tokens may be replayed from a CUDA graph, and one of them may be the end of a prompt: the
graph keeps the queries of every such step, and the window's are taken from there after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.plugin.worker_runtime.metadata import Capture, MixedDimMetadata
from mdkv_vllm.plugin.worker_runtime.request_table import Prompt
from mdkv_vllm.policy import Policy


@dataclass(frozen=True)
class _RecentQuery:
    """A window query that the last step left among its recent ones."""

    prompt: Prompt
    at: int
    token: int


class QueryWindow:
    """Captures the window queries of all prompts.

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
        self._size = policy.config.window
        layers, head_size = policy.num_layers, policy.geometry.head_size
        self.shape = (layers, num_query_heads, self._size, head_size)
        # Kept as computed where the kernels take them so.
        self.dtype = query_dtype if device.type == "cuda" else torch.float32
        self._recent = torch.zeros(
            layers, graph_tokens, num_query_heads, head_size, dtype=query_dtype, device=device
        )
        self._from_recent: list[_RecentQuery] = []

    @property
    def graph_tokens(self) -> int:
        """The largest batch whose queries are kept."""
        return self._recent.shape[1]

    def recent(self, layer: int, tokens: int) -> torch.Tensor | None:
        """Where a layer's queries are to be kept, ``[tokens, query_heads, head_size]``."""
        return self._recent[layer, :tokens] if tokens else None

    def bytes_of(self, prompts: int) -> int:
        """Bytes of the windows of as many prompts."""
        return prompts * math.prod(self.shape) * self.dtype.itemsize

    def note(
        self,
        prompt: Prompt,
        plan: LeasePlan,
        metadata: MixedDimMetadata,
        start: int,
        context: int,
        length: int,
    ) -> None:
        """See to it that the window queries of a chunk are captured.

        Args:
            prompt: whose chunk it is.
            plan: its plan.
            metadata: the step's; captures are added to it.
            start: the chunk's first query token in the batch.
            context: tokens before the chunk.
            length: tokens up to its end.
        """
        begin = plan.prompt_tokens - self._size
        first, last = max(context, begin), min(length, plan.prompt_tokens)
        if first >= last:
            return
        if prompt.window is None:
            device = self._recent.device
            prompt.window = torch.zeros(self.shape, dtype=self.dtype, device=device)
        at, token = first - begin, start + first - context
        if metadata.recent:
            self._from_recent.append(_RecentQuery(prompt, at, token))
        else:
            metadata.captures.append(Capture(prompt.window, at, token, last - first))

    def collect(self) -> None:
        """Take what the last step left among its recent queries."""
        for query in self._from_recent:
            if query.prompt.window is not None:
                query.prompt.window[:, :, query.at] = self._recent[:, query.token]
        self._from_recent = []
