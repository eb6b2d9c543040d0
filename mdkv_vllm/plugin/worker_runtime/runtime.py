"""One worker's leases: the parts that stand around its cache, composed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeKernel
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.prefill.leased import LeasedPrefill
from mdkv_vllm.plugin.rows import BatchOrder
from mdkv_vllm.plugin.worker_runtime.compression_runner import CompressionRunner
from mdkv_vllm.plugin.worker_runtime.metadata import MixedDimMetadata, StepLimits
from mdkv_vllm.plugin.worker_runtime.query_window import QueryWindow
from mdkv_vllm.plugin.worker_runtime.reports import Totals
from mdkv_vllm.plugin.worker_runtime.request_table import RequestTable
from mdkv_vllm.plugin.worker_runtime.step_builder import StepBuilder
from mdkv_vllm.policy import Policy
from mdkv_vllm.request import CompressionRequest


class Runtime:
    """One worker's leases.

    Args:
        policy: the settings applied to the model.
        compressor: compresses prompts.
        decode: the decode kernel over ``kv_cache``.
        prefill: attention of prompts.
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
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
        prefill: LeasedPrefill,
        kv_cache: torch.Tensor,
        num_query_heads: int,
        query_dtype: torch.dtype,
        limits: StepLimits,
        order: BatchOrder,
    ) -> None:
        self.policy = policy
        self.kv_cache = kv_cache
        self._decode = decode
        self._limits = limits
        self._query_shape = (num_query_heads, policy.geometry.head_size)
        self._query_dtype = query_dtype
        device = kv_cache.device
        self._table = RequestTable(policy)
        self._window = QueryWindow(
            policy, num_query_heads, query_dtype, limits.graph_tokens, device
        )
        self._runner = CompressionRunner(policy, compressor, kv_cache, limits.decode_tokens)
        self._builder = StepBuilder(self._table, self._window, prefill, order, limits, device)
        self._stepping = False

    @property
    def totals(self) -> Totals:
        """What compressions have done since counting started."""
        return self._runner.totals

    def start_counting(self, metrics: WorkerMetrics) -> None:
        """See :meth:`.CompressionRunner.start_counting`."""
        self._runner.start_counting(metrics)

    def read_records(self, wait: bool) -> None:
        """See :meth:`.CompressionRunner.read_records`."""
        self._runner.read_records(wait)

    def status(self) -> dict[str, Any]:
        """Totals, the requests now resident without their content, and recent compressions."""
        totals = self._runner.describe()
        recent = totals.pop("recent")
        return {"totals": totals, "requests": self._table.describe(), "recent": recent}

    def layer_of(self, kv_cache: torch.Tensor) -> int:
        """Index of a layer from its view of the cache."""
        offset = kv_cache.storage_offset() - self.kv_cache.storage_offset()
        return offset // (self.policy.num_kv_heads * self.kv_cache.stride(1))

    @contextmanager
    def step(
        self,
        finished: set[str],
        preempted: set[str],
        new: Iterable[CompressionRequest],
        computed_tokens: Mapping[str, int],
    ) -> Iterator[None]:
        """Around one step of the model; what runs outside of any is vLLM's warm-up.

        Compresses segments that ripened in steps before: the tokens of those steps do not wait,
        and a request that ends with one costs nothing. The scheduler may already have given freed
        blocks away, but nobody writes them before this step's forward pass. It frees by the counts
        that come with the step, or by smaller ones where it runs ahead.

        Args:
            finished: ids of requests that ended since the last step.
            preempted: ids of requests that lost all their blocks since.
            new: requests that this step brings.
            computed_tokens: of requests that it goes on with, by their ids: those computed before
                it, without drafts that were rejected.
        """
        self._window.collect()
        for held in self._table.count(computed_tokens):
            for segment in held.take_ripe():
                self._runner.add(held, segment)
        self._runner.run(finished | preempted)
        self._table.remove(finished, preempted)
        self._runner.read_records(wait=False)
        self._table.add(new)
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def begin_step(self, batch: CommonAttentionMetadata) -> MixedDimMetadata:
        """One step's metadata, shared by all layers."""
        if not self._stepping:  # vLLM made it up, and it writes where the last one's queries lie
            self._window.collect()
        return self._builder.build(batch, self._stepping)

    def attend(
        self,
        kv_cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: MixedDimMetadata,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """One layer of a step.

        Args:
            kv_cache: the layer's view of the cache, which holds the step's keys and values.
            query: ``[tokens, query_heads, head_size]``.
            key: ``[tokens, kv_heads, head_size]``.
            value: same.
            metadata: the step's.
            scale: factor of the scores.
            output: written, as the query.
        """
        layer = self.layer_of(kv_cache)
        if metadata.prefill is not None:
            metadata.prefill.attend(query, key, value, kv_cache, layer, scale, output)
        for capture in metadata.captures:
            capture.copy(layer, query)
        self._attend_to_leases(layer, query, metadata, output)

    def _attend_to_leases(
        self, layer: int, query: torch.Tensor, metadata: MixedDimMetadata, output: torch.Tensor
    ) -> None:
        decode = metadata.decode
        if decode is None:
            return
        in_place = isinstance(decode.tokens, slice)
        rows = query[decode.tokens]
        result = output[decode.tokens] if in_place else torch.empty_like(rows)
        # Of a step whose queries are kept all tokens are decoded.
        recent = self._window.recent(layer, metadata.recent)
        self._decode.attend(rows, layer, decode.batch, result, recent=recent)
        if not in_place:
            output[decode.tokens] = result

    def warm_up(self, prompt_tokens: int) -> None:
        """Run every kernel once, on nothing: compiles them, and shows what memory they take.

        Args:
            prompt_tokens: the longest prompt to expect.
        """
        device, queries = self.kv_cache.device, 1
        while queries <= self._limits.requests:
            nothing = torch.zeros(queries, dtype=torch.int32, device=device)
            query = torch.zeros(queries, *self._query_shape, dtype=self._query_dtype, device=device)
            table = torch.zeros(queries, 1, dtype=torch.int32, device=device)
            shape = (queries, self._limits.leases, 2)
            leases = torch.zeros(shape, dtype=torch.int32, device=device)
            batch = DecodeBatch(table, nothing, nothing, leases)
            output = torch.empty_like(query)
            # Steps that graphs may replay keep their queries, others do not.
            self._decode.attend(query, 0, batch, output)
            if queries <= self._window.graph_tokens:
                kept = self._window.recent(0, queries)
                self._decode.attend(query, 0, batch, output, recent=kept)
            queries *= 2
        window = torch.randn(self._window.shape, dtype=self._window.dtype, device=device)
        self._runner.warm_up(prompt_tokens, window)

    @property
    def window_bytes(self) -> int:
        """Bytes of the windows that may be held: a request's next one each, and a chunk's."""
        config = self.policy.config
        shortest = min(config.min_prompt_tokens, config.segment_tokens)
        return self._window.bytes_of(self._limits.requests + self._limits.tokens // shortest)


_current: Runtime | None = None


def install_runtime(runtime: Runtime | None) -> None:
    """Make a runtime this worker process's own, or none.

    vLLM makes backends and metadata builders by class, and hands them nothing of ours.
    """
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
