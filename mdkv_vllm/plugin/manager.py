"""The scheduler's side of leases: what is hashed, what may be hit, what is freed, what fits.

Invariants kept here: a block that a compression writes is held by one request and was never hashed;
freed blocks keep their hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from mdkv_vllm.core.admission import Growth, most_growth
from mdkv_vllm.core.plan import SLACK_TOKENS, RequestPlan, Segment, SkipReason
from mdkv_vllm.plugin.compat import remove_blocks
from mdkv_vllm.plugin.metrics.scheduler import SchedulerMetrics
from mdkv_vllm.request import CompressionRequest, without_compression


@dataclass
class _Resident:
    """A request that holds blocks.

    Attributes:
        plan: its segments, or why it has none.
        unfreed: those that come after ``due``.
        due: the next one that gives blocks back.
        ends_at: tokens that it has at most.
        computed: tokens that are known to be computed.
        freed: blocks that it has given back.
    """

    plan: RequestPlan | SkipReason
    unfreed: Iterator[Segment]
    due: Segment | None
    ends_at: int
    computed: int = 0
    freed: int = 0

    def growth(self, blocks: int) -> Growth:
        """What is to come of it.

        Args:
            blocks: of its table, those given back among them.
        """
        left = max(0, self.ends_at - self.computed)
        return _growth(blocks - self.freed, left, self.computed, self.due)

    def free(self, segment: Segment) -> None:
        """Go on to the segment behind one whose blocks are given back."""
        self.freed += _freed(segment)
        self.due = next(self.unfreed, None)


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
        self._residents: dict[str, _Resident] = {}
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
        if request.request_id not in self._residents:
            parsed = _parse(request)
            decided = self._decide(request, parsed)
            segments = _segments(decided)
            ends_at = request.num_prompt_tokens + request.max_tokens
            self._residents[request.request_id] = _Resident(
                decided, segments, next(segments, None), ends_at
            )
            if self._seen.get(id(request.block_hashes)) is not request:  # not a resumed one
                share = self._policy.share(parsed.prompt_tokens, parsed.budget)
                self._metrics.decided(share, decided)
            self._seen[id(request.block_hashes)] = request
        self._metrics.holds(request.request_id, len(self.req_to_blocks[request.request_id]))
        if not self._hashes_blocks:
            return
        plan = self._residents[request.request_id].plan
        num_tokens = self._before_leases(plan, num_tokens)
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

        And beside others that run, so many that all may grow until they give blocks back.
        Requests with larger budgets of their own are admitted by the server's as well.
        """
        if not apply_admission_cap:
            return super().get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks, *arguments, **kwargs
            )
        most = self._policy.most_blocks(num_tokens, self._in_flight_tokens)
        needed = super().get_num_blocks_to_allocate(
            request_id, min(num_tokens, most * self.block_size), new_computed_blocks,
            *arguments, **kwargs,
        )  # fmt: skip
        return needed + self._growth_beside(num_tokens)

    def _growth_beside(self, tokens: int) -> int:
        """Blocks that a request of so many tokens and those that run may yet take together."""
        config = self._policy.config
        running = [
            resident.growth(len(self.req_to_blocks[request_id]))
            for request_id, resident in self._residents.items()
            if resident.plan is not SkipReason.SESSION  # it may wait for ever
        ]
        if not running or not config.enabled:
            return 0
        plan = self._policy.plan(tokens)
        due = list(plan.prompt_segments) if isinstance(plan, RequestPlan) else []
        new = _growth(-(-tokens // self.block_size), None, tokens, due[-1] if due else None)
        # So far that each of them gives back once, if it ever does.
        horizon = config.segment_tokens + config.window + SLACK_TOKENS
        return most_growth([new, *running], self.block_size, horizon)

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
        resident = self._residents.get(request_id)
        if resident is None:
            return
        resident.computed = processed_computed_tokens
        while (segment := resident.due) and segment.due_at <= processed_computed_tokens:
            remove_blocks(self, request_id, segment.first_block, segment.first_lease_block)
            self._metrics.returned(request_id, segment)
            resident.free(segment)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; vLLM frees what is returned."""
        self._residents.pop(request_id, None)
        self._metrics.released(request_id)
        return super().pop_blocks_for_free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No common prefix: cascade attention cannot read leases."""
        return 0


def _segments(plan: RequestPlan | SkipReason) -> Iterator[Segment]:
    return plan.segments() if isinstance(plan, RequestPlan) else iter(())


def _freed(segment: Segment) -> int:
    return segment.num_blocks - segment.num_lease_blocks


def _growth(held: int, left: int | None, computed: int, due: Segment | None) -> Growth:
    if due is None:
        return Growth(held, left)
    return Growth(held, left, max(0, due.due_at - computed), _freed(due))


def _parse(request: Request) -> CompressionRequest:
    tokens, params = request.num_prompt_tokens, request.sampling_params
    if params is None:
        return CompressionRequest(request.request_id, tokens, generates=False)
    return CompressionRequest.parse(request.request_id, tokens, params.extra_args)
