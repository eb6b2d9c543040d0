"""Compressions that are due: run before the next step's forward pass, counted once done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.core.prompt import LoadLayer, PagedTokens
from mdkv_vllm.plugin.kv_cache import load_tokens
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.worker_runtime.reports import CompressionRecord, Stopwatch, Totals
from mdkv_vllm.plugin.worker_runtime.request_table import Prompt
from mdkv_vllm.policy import Policy


@dataclass(frozen=True)
class _Pending:
    """A prompt whose last chunk was in the last step."""

    prompt: Prompt
    plan: LeasePlan
    blocks: torch.Tensor


class CompressionRunner:
    """Compresses prompts where they lie.

    Args:
        policy: the settings applied to the model.
        compressor: compresses a prompt.
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
    """

    def __init__(self, policy: Policy, compressor: Compressor, kv_cache: torch.Tensor) -> None:
        self.totals = Totals()
        self._policy = policy
        self._compressor = compressor
        self._kv_cache = kv_cache
        self._pending: list[_Pending] = []
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

    def add(self, prompt: Prompt, plan: LeasePlan, blocks: torch.Tensor) -> None:
        """Have a prompt compressed that this step ends.

        Args:
            prompt: its window is captured in this step at the latest.
            plan: its plan.
            blocks: integer ``[blocks]``, ids of the blocks that the prompt lies in.
        """
        self._pending.append(_Pending(prompt, plan, blocks))

    def run(self, gone: set[str]) -> None:
        """Compress what is due, one prompt after the other, but of no request that is gone."""
        for record in self._records:
            record.resident &= record.request_id not in gone
        if self._metrics is not None:
            self._metrics.released(gone)
        for pending in self._pending:
            if pending.prompt.request.request_id not in gone:
                self._compress(pending)
        self._pending = []

    def _compress(self, pending: _Pending) -> None:
        prompt, plan = pending.prompt, pending.plan
        assert prompt.window is not None
        watch = Stopwatch(self._kv_cache.device)
        tokens = self._prompt_tokens(pending.blocks, plan.prompt_tokens)
        result = self._compressor.compress(tokens, prompt.window, plan)
        lease = pending.blocks[plan.first_lease_block : plan.tail_block].long()
        target = self._kv_cache.view(torch.uint8).flatten(1)
        target[lease] = result.pages.view(plan.num_lease_blocks, -1)
        prompt.window = None
        self._records.append(
            CompressionRecord(prompt.request.request_id, plan, result.tokens, watch)
        )

    def warm_up(self, prompt_tokens: int, window: torch.Tensor) -> None:
        """Compress whatever lies in one block, as every block of a prompt; nothing is written.

        Args:
            prompt_tokens: the prompt's length.
            window: any queries, as a prompt's.
        """
        plan = self._policy.plan(prompt_tokens)
        if not isinstance(plan, LeasePlan):
            return
        needed = -(-prompt_tokens // plan.block_size)
        blocks = torch.zeros(needed, dtype=torch.int32, device=self._kv_cache.device)
        self._compressor.compress(self._prompt_tokens(blocks, prompt_tokens), window, plan)

    def _prompt_tokens(self, blocks: torch.Tensor, tokens: int) -> LoadLayer:
        """A prompt's keys and values: where GPU kernels read them, or a layer's copy on CPU."""
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
