"""The scheduler's side of leases: what is hashed, what may be hit, what is freed, what fits.

Invariants kept here: a block that a compression writes is held by one request and was never hashed;
freed blocks keep their hash; a lease is hashed when it has been written, and never written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from mdkv_vllm.core.admission import most_growth
from mdkv_vllm.core.plan import SLACK_TOKENS, RequestPlan, SkipReason, may_share
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.plugin.compat import remove_blocks, reuse_first
from mdkv_vllm.plugin.metrics.scheduler import SchedulerMetrics
from mdkv_vllm.plugin.resident import Resident, growth_of, segments_of
from mdkv_vllm.plugin.shared_prefixes import SharedPrefixes, shared_segments
from mdkv_vllm.request import CompressionRequest, with_shared, without_compression


class MixedDimManager(FullAttentionManager):
    """Full attention whose compressed segments give blocks back in mid-request."""

    _of_pool: ClassVar[WeakValueDictionary[int, MixedDimManager]] = WeakValueDictionary()
    """By the identity of the block pool, which each keeps alive."""

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(kv_cache_spec, **kwargs)
        self._policy = kv_cache_spec.policy
        self._in_flight_tokens = kv_cache_spec.in_flight_tokens
        self._hashes_blocks: bool = kwargs["enable_caching"]
        # cache_blocks is the one call that shows a manager the request itself, and vLLM makes
        # it only where caching is enabled; whether blocks are hashed is decided below.
        self.enable_caching = True
        self._shares = self._policy.shares and self._hashes_blocks
        self._residents: dict[str, Resident] = {}
        self._stride = self._policy.config.segment_tokens // self.block_size
        self._steps = 0
        self._shared = SharedPrefixes(self.block_pool, self.kv_cache_group_id, self.block_size)
        self._seen: WeakValueDictionary[int, Request] = WeakValueDictionary()
        self._metrics = SchedulerMetrics(self._policy)
        self._of_pool[id(self.block_pool)] = self

    @classmethod
    def of_pool(cls, block_pool: BlockPool) -> MixedDimManager:
        """The manager whose blocks come from a pool; there is one for each."""
        return cls._of_pool[id(block_pool)]

    def before_leases(self, request: Request, tokens: int) -> int:
        """Of so many tokens of a request, those before the first lease that it ever has."""
        resident = self._residents.get(request.request_id)
        return self._before_leases(resident.plan if resident else self.plan_of(request), tokens)

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
            self._add(request)
        resident = self._residents[request.request_id]
        self._tell_worker(resident)
        self._metrics.holds(request.request_id, len(self.req_to_blocks[request.request_id]))
        # What is computed behind leases of others is not what full attention would have computed.
        if not self._hashes_blocks or resident.shared:
            return
        super().cache_blocks(
            request,
            self._before_leases(resident.plan, num_tokens),
            retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def _add(self, request: Request) -> None:
        """Take in a request that has just been given its first blocks."""
        request_id = request.request_id
        cached = self.num_cached_block.get(request_id, 0)
        shared = shared_segments(self.req_to_blocks[request_id][:cached])
        parsed = replace(_parse(request), shared=shared)
        decided = self._decide(request, parsed)
        segments = segments_of(decided)
        for_others = self._shares and parsed.budget is None
        path = self._shared.path_of(shared, request.block_hashes) if for_others else None
        self._residents[request_id] = Resident(
            request, decided, segments, next(segments, None), path, shared
        )
        self._metrics.shares(request_id, shared, self.block_size)
        if self._seen.get(id(request.block_hashes)) is not request:  # not a resumed one
            share = self._policy.share(parsed.prompt_tokens, parsed.budget)
            self._metrics.decided(share, decided)
        self._seen[id(request.block_hashes)] = request

    def _tell_worker(self, resident: Resident) -> None:
        """Say in a request's own parameters, which workers see, what they cannot know otherwise.

        These are the leases of others that it reads, and whether it stays uncompressed. Once, and
        again when a session that grows brings parameters anew.
        """
        params = resident.request.sampling_params
        if params is None:
            assert not resident.shared, "without sampling parameters no prefix cache is read"
            return
        if params is resident.told:
            return
        told = with_shared(params.extra_args, resident.shared)
        if resident.plan in (SkipReason.SESSION, SkipReason.SHARED_BLOCKS):
            told = without_compression(told)
        if told != (params.extra_args or {}):
            params = params.clone()
            params.extra_args = told
            resident.request.sampling_params = params
        resident.told = params

    def _before_leases(self, plan: RequestPlan | SkipReason, tokens: int) -> int:
        """Of so many tokens, those before the first lease that a request ever has of its own."""
        first = plan.first_lease_block if isinstance(plan, RequestPlan) else None
        return tokens if first is None else min(tokens, first * self.block_size)

    def _decide(self, request: Request, parsed: CompressionRequest) -> RequestPlan | SkipReason:
        """The plan of a request that has just been given its first blocks, or why it has none.

        Its first own lease lies behind whatever it got from the cache.
        """
        plan = self._policy.plan_request(parsed)
        if not isinstance(plan, RequestPlan):
            return plan
        if request.resumable:
            return SkipReason.SESSION  # its prompt is extended later
        cached = self.num_cached_block.get(request.request_id, 0) * self.block_size
        if cached != self._before_leases(plan, cached):
            return SkipReason.SHARED_BLOCKS  # a lease may not be written into blocks of others
        return plan

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        *arguments: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find the longest cached prefix: segments of others, or full-size blocks.

        These end before the request's own first lease. Segments are read where they reach further.
        With several groups, vLLM has the others find as much or less, and cuts ours to that.
        """
        manager = cls.of_pool(block_pool)  # of several groups, vLLM asks the class
        full_size, tokens = super().find_longest_cache_hit(
            block_hashes,
            manager._most_at_full_size(block_hashes, max_length),
            kv_cache_group_ids,
            block_pool,
            *arguments,
            **kwargs,
        )
        shared = manager._find_shared(block_hashes, max_length)
        if len(shared) * manager.block_size <= tokens:
            return full_size, tokens
        return (shared,), len(shared) * manager.block_size

    def _resumed(self, block_hashes: BlockHashList) -> Request | None:
        """The request with these hashes, if it was met before."""
        request = self._seen.get(id(block_hashes))
        return request if request is not None and request.block_hashes is block_hashes else None

    def _most_at_full_size(self, block_hashes: BlockHashList, max_length: int) -> int:
        """Tokens before a request's first lease, known by its hashes.

        One met for the first time asks for its whole prompt less one token; one that was preempted
        asks for more. Budgets above the server's default read no prefix cache at all (see
        :mod:`mdkv_vllm.plugin.validation`), so the default plan is the widest to expect.
        """
        if request := self._resumed(block_hashes):
            plan = self._policy.plan_request(replace(_parse(request), shared=()))
        else:
            plan = self._policy.plan(max_length + 1)
        return self._before_leases(plan, max_length)

    def _find_shared(self, block_hashes: BlockHashList, max_length: int) -> list[KVCacheBlock]:
        """Segments of others that a request begins with.

        None where it was met before: the worker remembers it, and is not told anew of leases that
        it may share.
        """
        if not self._shares or self._resumed(block_hashes):
            return []
        blocks = self._shared.find(block_hashes, max_length)
        self._metrics.published(self._shared.published, self._shared.evicted)
        return blocks

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
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *arguments, **kwargs
        )
        if not apply_admission_cap:
            return needed
        most = self._policy.most_blocks(num_tokens, self._in_flight_tokens)
        return min(needed, most) + self._growth_beside(num_tokens, new_computed_blocks)

    def _growth_beside(self, tokens: int, cached: Sequence[KVCacheBlock]) -> int:
        """Blocks that a request and those that run may yet take together.

        Args:
            tokens: of the request, which is to be computed at once.
            cached: blocks that it got from the cache.
        """
        config = self._policy.config
        running = [
            resident.growth(len(self.req_to_blocks[request_id]))
            for request_id, resident in self._residents.items()
            if not resident.request.resumable  # a session may wait for ever
        ]
        if not running or not config.enabled:
            return 0
        shared = shared_segments(cached)
        plan = self._policy.plan(tokens, shared=shared)
        due = list(plan.prompt_segments) if isinstance(plan, RequestPlan) else []
        held = -(-tokens // self.block_size) - (shared[-1].end_block if shared else 0)
        new = growth_of(held, None, tokens, due[-1] if due else None)
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
        if resident.gave_back_in < self._steps:
            self._publish(resident)
        while (segment := resident.due) and segment.due_at <= processed_computed_tokens:
            self._give_back(resident, segment)
            self._metrics.returned(request_id, segment)
            resident.free(segment)
            resident.gave_back_in = self._steps

    def _give_back(self, resident: Resident, segment: Segment) -> None:
        """Free the blocks before a segment's lease.

        They may be found at full size until they are given away. Of a segment of one stride that
        serves only who differs within it, while others read the lease: so they go first. By last
        use alone they would drive out leases, each of which stands for several times as much.
        """
        request_id = resident.request.request_id
        first, last = segment.first_block, segment.first_lease_block
        freed = self.req_to_blocks[request_id][first:last]
        remove_blocks(self, request_id, first, last)
        if resident.path is not None and segment.num_blocks <= 3 * self._stride // 2:
            reuse_first(self.block_pool, reversed(freed))  # a prefix is found from its first on

    def new_step_starts(self) -> None:
        """Whoever still holds blocks was not preempted in the step before."""
        super().new_step_starts()
        self._steps += 1

    def _publish(self, resident: Resident) -> None:
        """Let others read what the worker has compressed by now."""
        if not resident.unpublished:
            return
        request, hashes = resident.request, resident.request.block_hashes
        while resident.unpublished:
            segment = resident.unpublished[0]
            if not self._is_for_others(resident, segment):
                resident.path = None  # nor is what follows it
            elif self._shared.key_block(segment) >= len(hashes):
                break  # the tokens that it is known by are still to come
            else:
                assert resident.path is not None
                blocks = self.req_to_blocks[request.request_id]
                resident.path = self._shared.publish(resident.path, segment, hashes, blocks)
            resident.unpublished.pop(0)
        self._metrics.published(self._shared.published, self._shared.evicted)

    def _is_for_others(self, resident: Resident, segment: Segment) -> bool:
        path, plan = resident.path, resident.plan
        if path is None or path.forgotten or not isinstance(plan, RequestPlan):
            return False
        return may_share(segment, plan.terms)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; vLLM frees what is returned."""
        resident = self._residents.pop(request_id, None)
        # Of one that ended the worker runs the step in which its segments were due, but not of one
        # that was preempted in it.
        if resident is not None and resident.request.is_finished():
            self._publish(resident)
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
