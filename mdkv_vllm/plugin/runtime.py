"""The worker's side of leases: who is compressed, what to capture, when to compress."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.ops import cpu
from mdkv_vllm.ops.compress import CpuKernels
from mdkv_vllm.plugin.metadata import Capture, Decode, MixedDimMetadata
from mdkv_vllm.plugin.prefill import Prefill
from mdkv_vllm.plugin.rows import BatchRows, Row
from mdkv_vllm.policy import Policy

_RECENT = 64
"""Compressions remembered for reports."""


@dataclass
class _Prompt:
    """A prompt on its way to compression, or compressed."""

    row: Row
    plan: LeasePlan | None
    window: torch.Tensor | None = None


@dataclass(frozen=True)
class _Pending:
    """A prompt whose last chunk was in the last step."""

    prompt: _Prompt
    blocks: torch.Tensor


@dataclass(frozen=True)
class CompressionReport:
    """What one compression did.

    Attributes:
        request_id: vLLM's id.
        prompt_tokens: length of the prompt.
        full_blocks: blocks the prompt held before.
        kept_blocks: blocks it holds after (lease and full-dimension tail).
        kept_share: bytes kept over full bytes.
        tokens: per format, tokens kept over all layers and heads, dropped ones included.
        seconds: how long it took.
    """

    request_id: str
    prompt_tokens: int
    full_blocks: int
    kept_blocks: int
    kept_share: float
    tokens: dict[str, int]
    seconds: float


@dataclass
class Totals:
    """Running totals since start-up."""

    prompts: int = 0
    blocks_returned: int = 0
    seconds: float = 0.0
    recent: list[CompressionReport] = field(default_factory=list)

    def add(self, report: CompressionReport) -> None:
        """Count one compression."""
        self.prompts += 1
        self.blocks_returned += report.full_blocks - report.kept_blocks
        self.seconds += report.seconds
        self.recent = [*self.recent[-_RECENT + 1 :], report]


class Runtime:
    """One worker's leases.

    Args:
        policy: the settings applied to the model.
        basis: calibrated basis, None where none is needed.
        heads: how heads share a lease's pages; None for evenly by layer.
        arena: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        num_query_heads: query heads per layer on this rank.
        scale: factor of the attention scores, the same in every layer.
        batch: reads the running batch.
    """

    def __init__(
        self,
        policy: Policy,
        basis: Basis | None,
        heads: HeadBudgets | None,
        arena: torch.Tensor,
        num_query_heads: int,
        scale: float,
        batch: BatchRows,
    ) -> None:
        self.policy = policy
        self.arena = arena
        self.totals = Totals()
        self._scale = scale
        self._num_query_heads = num_query_heads
        self._batch = batch
        self._prompts: dict[str, _Prompt] = {}
        self._pending: list[_Pending] = []
        self._compressor = Compressor(
            policy.layout, policy.config.loss, scale, basis, heads, CpuKernels()
        )
        self._tables = cpu.DecodeTables.build(policy.layout, basis)

    def layer_of(self, kv_cache: torch.Tensor) -> int:
        """Index of a layer from its view of the cache."""
        offset = kv_cache.storage_offset() - self.arena.storage_offset()
        return offset // (self.policy.num_kv_heads * self.arena.stride(1))

    def begin_step(
        self, query_starts: list[int], lengths: list[int], block_table: torch.Tensor
    ) -> MixedDimMetadata:
        """Sort a step's requests into prefills and decodes, and note prompts that end in it.

        Args:
            query_starts: first query token of each request, and the end: ``[requests + 1]``.
            lengths: tokens of each request once the step is done.
            block_table: int32 ``[requests or more, max_blocks]``.
        """
        metadata = MixedDimMetadata()
        tokens: list[int] = []
        token_rows: list[int] = []
        token_lengths: list[int] = []
        leases = torch.zeros(len(lengths), 2, dtype=torch.int32)
        for index, (row, length) in enumerate(zip(self._batch.rows(), lengths, strict=False)):
            start, stop = query_starts[index], query_starts[index + 1]
            context = length - (stop - start)
            prompt = self._prompt(row)
            leased = prompt.plan is not None and context >= row.prompt_tokens
            if leased:
                assert prompt.plan is not None
                leases[index, 0] = prompt.plan.first_lease_block
                leases[index, 1] = prompt.plan.tail_block
            elif prompt.plan is not None:
                self._note_prompt(prompt, metadata, start, context, length, block_table[index])
            if leased or stop - start == 1:
                tokens += range(start, stop)
                token_rows += [index] * (stop - start)
                token_lengths += range(context + 1, length + 1)
            else:
                blocks = -(-context // self.policy.geometry.block_size)
                metadata.prefills.append(Prefill(start, stop, context, block_table[index, :blocks]))
        if tokens:
            contiguous = tokens[-1] - tokens[0] + 1 == len(tokens)
            metadata.decode = Decode(
                slice(tokens[0], tokens[-1] + 1) if contiguous else torch.tensor(tokens),
                torch.tensor(token_rows, dtype=torch.int32),
                torch.tensor(token_lengths, dtype=torch.int32),
                leases,
                block_table,
            )
        return metadata

    def _prompt(self, row: Row) -> _Prompt:
        prompt = self._prompts.get(row.request_id)
        if prompt is None:
            plan = self.policy.plan(row.prompt_tokens, row.budget) if row.compressible else None
            prompt = self._prompts[row.request_id] = _Prompt(row, plan)
        return prompt

    def _note_prompt(
        self,
        prompt: _Prompt,
        metadata: MixedDimMetadata,
        start: int,
        context: int,
        length: int,
        blocks: torch.Tensor,
    ) -> None:
        """Capture window queries that this chunk holds; queue the prompt if it ends here."""
        assert prompt.plan is not None
        end, window = prompt.plan.prompt_tokens, self.policy.config.window
        first, last = max(context, end - window), min(length, end)
        if first < last:
            if prompt.window is None:
                layout = self.policy.layout
                prompt.window = torch.zeros(
                    layout.num_layers, self._num_query_heads, window, layout.geometry.head_size
                )
            at = first - (end - window)
            metadata.captures.append(
                Capture(prompt.window, at, start + first - context, last - first)
            )
        if length >= end:
            needed = -(-end // self.policy.geometry.block_size)
            self._pending.append(_Pending(prompt, blocks[:needed].clone()))

    def decode(
        self,
        layer: int,
        query: torch.Tensor,
        metadata: MixedDimMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attend with the mixed decode kernel; shapes as in vLLM's forward."""
        decode = metadata.decode
        assert decode is not None
        contiguous = isinstance(decode.tokens, slice)
        result = output[decode.tokens] if contiguous else torch.empty_like(query[decode.tokens])
        cpu.mixed_decode(
            query[decode.tokens],
            self.arena,
            layer,
            self._tables,
            decode.block_table,
            decode.rows,
            decode.lengths,
            decode.leases,
            self._scale,
            result,
        )
        if not contiguous:
            output[decode.tokens] = result

    def compress_ended(self, finished: set[str], preempted: set[str]) -> None:
        """Compress the prompts that ended in the last step, one after the other.

        Called before the next step runs, so the first token does not wait and a request that
        ends with it costs nothing. The scheduler may already have given freed blocks away, but
        nobody writes them before that step's forward pass.

        Args:
            finished: ids of requests that ended since.
            preempted: ids of requests that lost all their blocks since.
        """
        gone = finished | preempted
        for pending in self._pending:
            if pending.prompt.row.request_id not in gone:
                self._compress(pending)
        self._pending = []
        for request_id in finished:
            self._prompts.pop(request_id, None)
        for request_id in preempted & self._prompts.keys():
            self._prompts[request_id].window = None

    def _compress(self, pending: _Pending) -> None:
        started = time.perf_counter()
        prompt, plan = pending.prompt, pending.prompt.plan
        assert plan is not None
        assert prompt.window is not None
        result = self._compressor.compress(
            lambda layer: self._load_layer(layer, pending.blocks, plan.prompt_tokens),
            prompt.window,
            plan,
        )
        lease = pending.blocks[plan.first_lease_block : plan.tail_block].long()
        target = self.arena.view(torch.uint8).flatten(1)
        target[lease] = result.pages.view(plan.num_lease_blocks, -1)
        prompt.window = None
        self._report(prompt.row, plan, result.tokens, time.perf_counter() - started)

    def _load_layer(
        self, layer: int, blocks: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a prompt's layer, float32 ``[kv_heads, tokens, head_size]``."""
        heads = self.policy.num_kv_heads
        view = self.arena[:, layer * heads : (layer + 1) * heads]
        keys, values = torch.empty(2, heads, num_tokens, self.policy.geometry.head_size)
        cpu.load_kv(view, blocks, num_tokens, keys, values)
        return keys, values

    def _report(self, row: Row, plan: LeasePlan, tokens: torch.Tensor, seconds: float) -> None:
        names = [f.name for f in self.policy.layout.formats.formats]
        per_format = dict(zip(names, tokens.sum((0, 1)).tolist(), strict=True))
        total = plan.span_tokens * self.policy.layout.pages_per_block
        per_format["drop"] = total - sum(per_format.values())
        full = -(-plan.prompt_tokens // plan.block_size)
        self.totals.add(
            CompressionReport(
                row.request_id,
                plan.prompt_tokens,
                full,
                full - plan.first_lease_block,
                plan.kept_share,
                per_format,
                seconds,
            )
        )


_current: Runtime | None = None


def install_runtime(runtime: Runtime) -> None:
    """Make a runtime this worker process's own."""
    global _current
    _current = runtime


def current_runtime() -> Runtime:
    """The worker process's runtime.

    Raises:
        RuntimeError: the worker has not been set up by our worker class.
    """
    if _current is None:
        raise RuntimeError(
            "mixeddim: no runtime in this worker; --worker-cls must be left to the platform"
        )
    return _current
