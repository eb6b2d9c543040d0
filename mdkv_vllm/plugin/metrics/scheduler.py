"""What the scheduler's manager knows: what is compressed, which bytes are held."""

from __future__ import annotations

from collections.abc import Sequence

from mdkv_vllm.core.plan import RequestPlan, SkipReason
from mdkv_vllm.core.segment import PARTS, Segment, SharedSegment
from mdkv_vllm.plugin.metrics.recorder import Recorder, current_recorder
from mdkv_vllm.plugin.metrics.table import (
    BLOCKS_RETURNED,
    FULL_BYTES,
    KEPT_BYTES,
    PROMPT_BUDGET,
    PROMPTS_COMPRESSED,
    PROMPTS_SKIPPED,
    SEGMENTS_COMPRESSED,
    SEGMENTS_EVICTED,
    SEGMENTS_HIT,
    SEGMENTS_PUBLISHED,
    SHARED_TOKENS,
)
from mdkv_vllm.policy import Policy

_PLAIN = (
    PROMPTS_COMPRESSED,
    PROMPT_BUDGET,
    BLOCKS_RETURNED,
    FULL_BYTES,
    KEPT_BYTES,
    SEGMENTS_PUBLISHED,
    SEGMENTS_HIT,
    SEGMENTS_EVICTED,
    SHARED_TOKENS,
)


class SchedulerMetrics:
    """Keeps the scheduler's numbers as requests come and go.

    Args:
        policy: the settings applied to the model.
        recorder: where to; None for this process's.
    """

    def __init__(self, policy: Policy, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or current_recorder()
        page = policy.geometry.page_bytes
        self._block_bytes = page * policy.num_layers * policy.num_kv_heads * self._recorder.ranks
        self._held: dict[str, int] = {}
        self._returned: dict[str, int] = {}
        self._full_blocks = self._returned_blocks = 0
        self._published = self._evicted = 0
        for metric in _PLAIN:
            self._recorder.declare(metric)
        for reason in SkipReason:
            self._recorder.declare(PROMPTS_SKIPPED, reason=reason.value)
        for part in PARTS:
            self._recorder.declare(SEGMENTS_COMPRESSED, part=part)

    def decided(self, budget: float, plan: RequestPlan | SkipReason) -> None:
        """A new prompt is to be compressed, or not.

        Args:
            budget: share of its bytes to keep.
            plan: its plan, or why it is left alone.
        """
        if isinstance(plan, SkipReason):
            self._recorder.observe(PROMPT_BUDGET, 1.0)
            self._recorder.add(PROMPTS_SKIPPED, reason=plan.value)
        else:
            self._recorder.observe(PROMPT_BUDGET, budget)

    def holds(self, request_id: str, blocks: int) -> None:
        """A request's block table has that many entries, those given back included."""
        before = self._held.get(request_id, 0)
        if blocks != before:
            self._held[request_id] = blocks
            self._full_blocks += blocks - before
            self._set_bytes()

    def returned(self, request_id: str, segment: Segment) -> None:
        """A compressed segment of a request gives blocks back."""
        blocks = segment.num_freed_blocks
        if segment.first_block == 0 and segment.part == "prompt":
            self._recorder.add(PROMPTS_COMPRESSED)
        self._returned[request_id] = self._returned.get(request_id, 0) + blocks
        self._returned_blocks += blocks
        self._recorder.add(SEGMENTS_COMPRESSED, part=segment.part)
        self._recorder.add(BLOCKS_RETURNED, blocks)
        self._set_bytes()

    def shares(self, request_id: str, segments: Sequence[SharedSegment], block_size: int) -> None:
        """A request that has just been given blocks reads segments of others.

        Args:
            request_id: vLLM's.
            segments: what it reads, from its first token on.
            block_size: tokens in one block.
        """
        if not segments:
            return
        freed = sum(one.num_freed_blocks for one in segments)
        self._returned[request_id] = self._returned.get(request_id, 0) + freed
        self._returned_blocks += freed
        self._recorder.add(SEGMENTS_HIT, len(segments))
        self._recorder.add(SHARED_TOKENS, segments[-1].end_block * block_size)

    def published(self, published: int, evicted: int) -> None:
        """So many segments were published, and so many of them seen to be gone, in all."""
        if published > self._published:
            self._recorder.add(SEGMENTS_PUBLISHED, published - self._published)
        if evicted > self._evicted:
            self._recorder.add(SEGMENTS_EVICTED, evicted - self._evicted)
        self._published, self._evicted = published, evicted

    def released(self, request_id: str) -> None:
        """A request holds nothing any more."""
        held, returned = self._held.pop(request_id, 0), self._returned.pop(request_id, 0)
        self._full_blocks -= held
        self._returned_blocks -= returned
        if held:
            self._set_bytes()

    def _set_bytes(self) -> None:
        kept = self._full_blocks - self._returned_blocks
        self._recorder.set(FULL_BYTES, self._full_blocks * self._block_bytes)
        self._recorder.set(KEPT_BYTES, kept * self._block_bytes)
