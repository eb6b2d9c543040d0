"""The worker's side of leases: who is compressed, what to capture, when to compress."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.core.prompt import LoadLayer, PagedTokens
from mdkv_vllm.ops.decode import DecodeKernel
from mdkv_vllm.plugin.arena import load_tokens
from mdkv_vllm.plugin.metadata import Capture, Decode, MixedDimMetadata, StepBuffers
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.prefill import Chunk, PrefillAttention, on_device
from mdkv_vllm.plugin.reports import CompressionRecord, Stopwatch, Totals
from mdkv_vllm.plugin.rows import BatchOrder
from mdkv_vllm.policy import Policy
from mdkv_vllm.request import CompressionRequest


@dataclass
class _Prompt:
    """A prompt on its way to compression, or compressed."""

    request: CompressionRequest
    plan: LeasePlan | None
    window: torch.Tensor | None = None


@dataclass(frozen=True)
class _Pending:
    """A prompt whose last chunk was in the last step."""

    prompt: _Prompt
    blocks: torch.Tensor


@dataclass(frozen=True)
class _RecentQuery:
    """A window query that the last step left among its recent ones."""

    prompt: _Prompt
    at: int
    token: int


@dataclass(frozen=True)
class StepLimits:
    """How large a step may be.

    Attributes:
        tokens: query tokens.
        requests: rows.
        graph_tokens: the largest batch that a CUDA graph holds; 0 without graphs.
    """

    tokens: int
    requests: int
    graph_tokens: int


class Runtime:
    """One worker's leases.

    Args:
        policy: the settings applied to the model.
        compressor: compresses prompts.
        decode: the decode kernel over ``arena``.
        prefill: attention of prompts.
        arena: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        num_query_heads: query heads per layer on this rank.
        query_dtype: their type.
        limits: the largest step.
        order: reads the running batch.
    """

    def __init__(
        self,
        policy: Policy,
        compressor: Compressor,
        decode: DecodeKernel,
        prefill: PrefillAttention,
        arena: torch.Tensor,
        num_query_heads: int,
        query_dtype: torch.dtype,
        limits: StepLimits,
        order: BatchOrder,
    ) -> None:
        self.policy = policy
        self.arena = arena
        self.totals = Totals()
        self._compressor = compressor
        self._decode = decode
        self._prefill = prefill
        self._order = order
        self._limits = limits
        self._buffers = StepBuffers(limits.tokens, limits.requests, arena.device)
        self._window_shape = (
            policy.num_layers,
            num_query_heads,
            policy.config.window,
            policy.geometry.head_size,
        )
        # A step of single tokens may be replayed from a CUDA graph, and one of them may be the
        # end of a prompt. The graph keeps every query; the window's are taken from there.
        self._recent = torch.zeros(
            policy.num_layers,
            limits.graph_tokens,
            num_query_heads,
            policy.geometry.head_size,
            dtype=query_dtype,
            device=arena.device,
        )
        self._from_recent: list[_RecentQuery] = []
        self._prompts: dict[str, _Prompt] = {}
        self._pending: list[_Pending] = []
        self._records: list[CompressionRecord] = []
        self._stepping = False
        self._metrics: WorkerMetrics | None = None

    def start_counting(self, metrics: WorkerMetrics) -> None:
        """Count from here on; what came before was vLLM's rehearsal.

        Args:
            metrics: told of every compression and of the requests that are gone.
        """
        self.read_records(wait=True)
        self.totals = Totals()
        self._metrics = metrics

    def status(self) -> dict[str, Any]:
        """Totals, the requests now resident without their content, and recent compressions."""
        self.read_records(wait=True)
        requests = [
            {
                "request_id": request_id,
                "prompt_tokens": prompt.request.prompt_tokens,
                "planned_share": prompt.plan.kept_share if prompt.plan else 1.0,
            }
            for request_id, prompt in self._prompts.items()
        ]
        totals = asdict(self.totals)
        recent = totals.pop("recent")
        return {"totals": totals, "requests": requests, "recent": recent}

    def layer_of(self, kv_cache: torch.Tensor) -> int:
        """Index of a layer from its view of the cache."""
        offset = kv_cache.storage_offset() - self.arena.storage_offset()
        return offset // (self.policy.num_kv_heads * self.arena.stride(1))

    @contextmanager
    def step(
        self, finished: set[str], preempted: set[str], new: Iterable[CompressionRequest]
    ) -> Iterator[None]:
        """Around one step of the model; what runs outside of any is a rehearsal of vLLM's.

        Compresses the prompts that ended in the last step, one after the other: the first token
        does not wait, and a request that ends with it costs nothing. The scheduler may already
        have given freed blocks away, but nobody writes them before this step's forward pass.

        Args:
            finished: ids of requests that ended since the last step.
            preempted: ids of requests that lost all their blocks since.
            new: requests that this step brings.
        """
        self._end_prompts(finished, preempted)
        for request in new:
            plan = self.policy.plan_request(request)
            held = plan if isinstance(plan, LeasePlan) else None
            self._prompts[request.request_id] = _Prompt(request, held)
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def begin_step(self, batch: CommonAttentionMetadata) -> MixedDimMetadata:
        """Sort a step's requests into prefills and decodes, and note prompts that end in it."""
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        assert batch.seq_lens_cpu_upper_bound is not None
        lengths = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist()
        ids = self._order.request_ids(batch)[: batch.num_reqs] if self._stepping else []
        single = batch.max_query_len == 1
        metadata = MixedDimMetadata()
        if single and batch.num_actual_tokens <= self._recent.shape[1]:
            metadata.recent = batch.num_actual_tokens
        chunks: list[Chunk] = []
        tokens: list[int] = []
        token_rows: list[int] = []
        token_lengths: list[int] = []
        leases = [(0, 0)] * batch.num_reqs
        for row, request_id in enumerate(ids):
            prompt = self._prompts[request_id]
            start, stop, length = starts[row], starts[row + 1], lengths[row]
            context = length - (stop - start)
            plan = prompt.plan
            leased = plan is not None and context >= plan.prompt_tokens
            if leased:
                assert plan is not None
                leases[row] = (plan.first_lease_block, plan.tail_block)
            elif plan is not None:
                self._note_prompt(prompt, plan, metadata, start, context, length)
                if length >= plan.prompt_tokens:
                    needed = -(-plan.prompt_tokens // plan.block_size)
                    blocks = batch.block_table_tensor[row, :needed].clone()
                    self._pending.append(_Pending(prompt, blocks))
            if leased or stop - start == 1:
                tokens += range(start, stop)
                token_rows += [row] * (stop - start)
                token_lengths += range(context + 1, length + 1)
            else:
                chunks.append(Chunk(start, stop, context, row))
        if single:
            # Rows that pad a CUDA graph's batch have no request, and see nothing.
            padding = batch.num_actual_tokens - len(tokens)
            tokens = list(range(batch.num_actual_tokens))
            token_rows += [0] * padding
            token_lengths += [0] * padding
        if tokens:
            contiguous = tokens[-1] - tokens[0] + 1 == len(tokens)
            where = (
                slice(tokens[0], tokens[-1] + 1)
                if contiguous
                else (on_device(tokens, torch.int64, self.arena.device))
            )
            loaded = self._buffers.load(token_rows, token_lengths, leases)
            metadata.decode = Decode(where, *loaded, batch.block_table_tensor)
        if chunks:
            metadata.prefill = self._prefill.prepare(chunks, batch.block_table_tensor)
        return metadata

    def _note_prompt(
        self,
        prompt: _Prompt,
        plan: LeasePlan,
        metadata: MixedDimMetadata,
        start: int,
        context: int,
        length: int,
    ) -> None:
        """Capture the window queries that a chunk holds."""
        end, window = plan.prompt_tokens, self.policy.config.window
        first, last = max(context, end - window), min(length, end)
        if first >= last:
            return
        if prompt.window is None:
            prompt.window = torch.zeros(
                self._window_shape, dtype=self._window_dtype, device=self.arena.device
            )
        at, token = first - (end - window), start + first - context
        if metadata.recent:
            self._from_recent.append(_RecentQuery(prompt, at, token))
        else:
            metadata.captures.append(Capture(prompt.window, at, token, last - first))

    def decode(
        self,
        layer: int,
        query: torch.Tensor,
        metadata: MixedDimMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attend with the mixed decode kernel; shapes as in vLLM's forward."""
        decode = metadata.decode
        if decode is None:
            return
        in_place = isinstance(decode.tokens, slice)
        rows = query[decode.tokens]
        result = output[decode.tokens] if in_place else torch.empty_like(rows)
        # A step whose queries are kept is one of single tokens, so all of them are decoded.
        recent = self._recent[layer, : metadata.recent] if metadata.recent else None
        self._decode.attend(
            rows,
            layer,
            decode.block_table,
            decode.rows,
            decode.lengths,
            decode.leases,
            result,
            recent,
        )
        if not in_place:
            output[decode.tokens] = result

    def rehearse(self, prompt_tokens: int) -> None:
        """Run every kernel once, on nothing: compiles them, and shows what memory they take.

        Args:
            prompt_tokens: the longest prompt to expect.
        """
        device = self.arena.device
        _, heads, _, head_size = self._window_shape
        queries = 1
        while queries <= self._limits.requests:
            nothing = torch.zeros(queries, dtype=torch.int32, device=device)
            query = torch.zeros(queries, heads, head_size, dtype=self._recent.dtype, device=device)
            leases = torch.zeros(queries, 2, dtype=torch.int32, device=device)
            output = torch.empty_like(query)
            # Steps that graphs may replay keep their queries, others do not.
            self._decode.attend(query, 0, leases, nothing, nothing, leases, output)
            if queries <= self._limits.graph_tokens:
                kept = self._recent[0, :queries]
                self._decode.attend(query, 0, leases, nothing, nothing, leases, output, kept)
            queries *= 2
        plan = self.policy.plan(prompt_tokens)
        if isinstance(plan, LeasePlan):
            # Whatever lies in one block, as every block of the prompt.
            needed = -(-prompt_tokens // self.policy.geometry.block_size)
            blocks = torch.zeros(needed, dtype=torch.int32, device=device)
            self._compressor.compress(
                self._prompt_tokens(blocks, prompt_tokens),
                torch.randn(self._window_shape, dtype=self._window_dtype, device=device),
                plan,
            )

    def _end_prompts(self, finished: set[str], preempted: set[str]) -> None:
        """Compress the prompts that ended in the last step, and forget what is gone."""
        for query in self._from_recent:
            if query.prompt.window is not None:
                query.prompt.window[:, :, query.at] = self._recent[:, query.token]
        self._from_recent = []
        gone = finished | preempted
        for record in self._records:
            record.resident &= record.request_id not in gone
        if self._metrics is not None:
            self._metrics.released(gone)
        for pending in self._pending:
            if pending.prompt.request.request_id not in gone:
                self._compress(pending)
        self._pending = []
        for request_id in finished:
            self._prompts.pop(request_id, None)
        for request_id in preempted & self._prompts.keys():
            self._prompts[request_id].window = None
        self.read_records(wait=False)

    def _compress(self, pending: _Pending) -> None:
        prompt, plan = pending.prompt, pending.prompt.plan
        assert plan is not None
        assert prompt.window is not None
        watch = Stopwatch(self.arena.device)
        result = self._compressor.compress(
            self._prompt_tokens(pending.blocks, plan.prompt_tokens),
            prompt.window,
            plan,
        )
        lease = pending.blocks[plan.first_lease_block : plan.tail_block].long()
        target = self.arena.view(torch.uint8).flatten(1)
        target[lease] = result.pages.view(plan.num_lease_blocks, -1)
        prompt.window = None
        self._records.append(
            CompressionRecord(prompt.request.request_id, plan, result.tokens, watch)
        )

    def _prompt_tokens(self, blocks: torch.Tensor, tokens: int) -> LoadLayer:
        """A prompt's keys and values: where GPU kernels read them, or a layer's copy on CPU."""
        heads = self.policy.num_kv_heads
        if self._compressor.kernels.reads_pages:
            return PagedTokens(self.arena, blocks, tokens, heads)

        def load(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            view = self.arena[:, layer * heads : (layer + 1) * heads]
            return load_tokens(view, blocks, tokens, torch.float32)

        return load

    @property
    def _window_dtype(self) -> torch.dtype:
        """Window queries are kept as computed where the kernels take them so."""
        return self._recent.dtype if self.arena.device.type == "cuda" else torch.float32

    @property
    def window_bytes(self) -> int:
        """Bytes of the windows of as many prompts as may end in one step."""
        shortest = self.policy.config.min_prompt_tokens
        prompts = min(self._limits.requests, self._limits.tokens // shortest + 1)
        return prompts * math.prod(self._window_shape) * self._window_dtype.itemsize

    def read_records(self, wait: bool) -> None:
        """Count the compressions that the device has done.

        Args:
            wait: wait for those that it has not.
        """
        while self._records and (wait or self._records[0].finished):
            record = self._records.pop(0)
            report = record.read(self.policy.layout)
            self.totals.add(report)
            if self._metrics is not None:
                self._metrics.record_compression(report, resident=record.resident)


_current: Runtime | None = None


def install_runtime(runtime: Runtime | None) -> None:
    """Make a runtime this worker process's own, or none."""
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
