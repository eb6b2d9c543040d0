"""The scheduler's side of leases: what is hashed, what may be hit, what is freed, what fits.

Invariants kept here: a block that a compression writes is held by one request and was never hashed;
freed blocks keep their hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from mdkv_vllm.core.plan import RequestPlan, Segment, SkipReason
from mdkv_vllm.plugin.compat import remove_blocks
from mdkv_vllm.plugin.metrics.scheduler import SchedulerMetrics
from mdkv_vllm.request import CompressionRequest, without_compression


class MixedDimManager(FullAttentionManager):
    """Full attention whose compressed segments give blocks back in mid-request."""

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(kv_cache_spec, **kwargs)
        self._policy = kv_cache_spec.policy
        self._in_flight_tokens = kv_cache_spec.in_flight_tokens
        self._hashes_blocks: bool = kwargs["enable_caching"]
        # cache_blocks is the one call that shows a manager the request itself, and vLLM makes
        # it only where caching is enabled; whether blocks are hashed is decided below.
        self.enable_caching = True
        self._plans: dict[str, RequestPlan | SkipReason] = {}
        self._unfreed: dict[str, Iterator[Segment]] = {}
        self._next_due: dict[str, Segment] = {}
        self._seen: WeakValueDictionary[int, Request] = WeakValueDictionary()
        self._metrics = SchedulerMetrics(self._policy)

    def plan_of(self, request: Request) -> RequestPlan | SkipReason:
        """The plan of a request, or why it stays uncompressed."""
        return self._policy.plan_request(_parse(request))

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash the request's full blocks, but none from its first lease on."""
        if request.request_id not in self._plans:
            parsed = _parse(request)
            decided = self._decide(request, parsed)
            self._plans[request.request_id] = decided
            if isinstance(decided, RequestPlan):
                self._unfreed[request.request_id] = decided.segments()
                self._advance(request.request_id)
            if self._seen.get(id(request.block_hashes)) is not request:  # not a resumed one
                share = self._policy.share(parsed.prompt_tokens, parsed.budget)
                self._metrics.decided(share, decided)
            self._seen[id(request.block_hashes)] = request
        self._metrics.holds(request.request_id, len(self.req_to_blocks[request.request_id]))
        if not self._hashes_blocks:
            return
        num_tokens = self._before_leases(self._plans[request.request_id], num_tokens)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def _before_leases(self, plan: RequestPlan | SkipReason, tokens: int) -> int:
        """Of so many tokens, those before the first lease that a request ever has."""
        first = plan.first_lease_block if isinstance(plan, RequestPlan) else None
        return tokens if first is None else min(tokens, first * self.block_size)

    def _decide(self, request: Request, parsed: CompressionRequest) -> RequestPlan | SkipReason:
        """The plan of a request that has just been given its first blocks, or why it has none.

        A request that cannot be compressed is told so in its own parameters, which are what
        the worker plans by.
        """
        plan = self._policy.plan_request(parsed)
        if not isinstance(plan, RequestPlan):
            return plan
        shared_tokens = self.num_cached_block.get(request.request_id, 0) * self.block_size
        # Sessions extend their prompt later, and a lease must not be written into blocks that
        # a prefix hit shares with other requests.
        if not request.resumable and shared_tokens == self._before_leases(plan, shared_tokens):
            return plan
        assert request.sampling_params is not None
        params = request.sampling_params.clone()
        params.extra_args = without_compression(params.extra_args)
        request.sampling_params = params
        return SkipReason.SESSION if request.resumable else SkipReason.SHARED_BLOCKS

    def find_longest_cache_hit(  # type: ignore[override]
        self,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find the longest cached prefix that ends before the request's own first lease.

        vLLM calls this on the instance for models of one cache group, with the request's
        hashes but not the request. A request met for the first time asks for its whole
        prompt less one token; one that was preempted asks for more, and is known by its
        hashes. Budgets above the server's default read no prefix cache at all (see
        :mod:`mdkv_vllm.plugin.validation`), so the default plan is the widest to expect.
        """
        request = self._seen.get(id(block_hashes))
        if request is not None and request.block_hashes is block_hashes:
            plan = self.plan_of(request)
        else:
            plan = self._policy.plan(max_length + 1)
        return super().find_longest_cache_hit(
            block_hashes,
            self._before_leases(plan, max_length),
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            **kwargs,
        )

    def get_num_blocks_to_allocate(  # type: ignore[override]
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *arguments: Any,  # noqa: ANN401
        apply_admission_cap: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> int:
        """Blocks that a request needs; to be admitted, no more than it ever holds at a time.

        Requests with larger budgets of their own are admitted by the server's as well.
        """
        if apply_admission_cap:
            most = self._policy.most_blocks(num_tokens, self._in_flight_tokens)
            num_tokens = min(num_tokens, most * self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *arguments, **kwargs
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the blocks before the leases of segments that are due.

        The worker compresses those before its next forward pass, the first that may write a block
        freed here (see :meth:`mdkv_vllm.plugin.worker_runtime.runtime.Runtime.step`).
        """
        del num_prompt_tokens
        while segment := self._next_due.get(request_id):
            if processed_computed_tokens < segment.due_at:
                return
            remove_blocks(self, request_id, segment.first_block, segment.first_lease_block)
            self._metrics.returned(request_id, segment)
            self._advance(request_id)

    def _advance(self, request_id: str) -> None:
        """Go to the request's next segment, if it has another."""
        following = next(self._unfreed[request_id], None)
        if following is None:
            self._next_due.pop(request_id, None)
        else:
            self._next_due[request_id] = following

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; vLLM frees what is returned."""
        for known in (self._plans, self._unfreed, self._next_due):
            known.pop(request_id, None)  # type: ignore[attr-defined]
        self._metrics.released(request_id)
        return super().pop_blocks_for_free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No common prefix: cascade attention cannot read leases."""
        return 0


def _parse(request: Request) -> CompressionRequest:
    tokens, params = request.num_prompt_tokens, request.sampling_params
    if params is None:
        return CompressionRequest(request.request_id, tokens, generates=False)
    return CompressionRequest.parse(request.request_id, tokens, params.extra_args)
