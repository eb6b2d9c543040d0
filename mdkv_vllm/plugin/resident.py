"""What the scheduler's manager remembers of a request that holds blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from mdkv_vllm.core.admission import Growth
from mdkv_vllm.core.plan import RequestPlan, SkipReason
from mdkv_vllm.core.segment import Segment, SharedSegment
from mdkv_vllm.plugin.shared_prefixes import Prefix


@dataclass
class Resident:
    """A request that holds blocks.

    Attributes:
        request: vLLM's.
        plan: its segments, or why it has none.
        unfreed: those that come after ``due``.
        due: the next one that gives blocks back.
        path: the segments so far that others may read; None where a next one is not for others.
        shared: segments of others that it reads.
        told: its parameters when the worker was last told of them.
        computed: tokens that are known to be computed.
        freed: blocks that it does not hold, though they stand in its table.
        unpublished: segments whose blocks it has given back, in order.
        gave_back_in: the step in which it last did.
    """

    request: Request
    plan: RequestPlan | SkipReason
    unfreed: Iterator[Segment]
    due: Segment | None
    path: Prefix | None
    shared: tuple[SharedSegment, ...] = ()
    told: SamplingParams | None = None
    computed: int = 0
    freed: int = 0
    unpublished: list[Segment] = field(default_factory=list)
    gave_back_in: int = 0

    def __post_init__(self) -> None:
        self.freed = sum(one.num_freed_blocks for one in self.shared)

    def growth(self, blocks: int) -> Growth:
        """What is to come of it.

        Args:
            blocks: of its table, those given back among them.
        """
        ends_at = self.request.num_prompt_tokens + self.request.max_tokens
        # What others may read too is not given back when this one ends.
        held = blocks - self.freed - sum(one.num_lease_blocks for one in self.shared)
        return growth_of(held, max(0, ends_at - self.computed), self.computed, self.due)

    def free(self, segment: Segment) -> None:
        """Go on to the segment behind one whose blocks are given back."""
        self.freed += segment.num_freed_blocks
        self.unpublished.append(segment)
        self.due = next(self.unfreed, None)


def segments_of(plan: RequestPlan | SkipReason) -> Iterator[Segment]:
    """The segments of a request, none where it stays uncompressed."""
    return plan.segments() if isinstance(plan, RequestPlan) else iter(())


def growth_of(held: int, left: int | None, computed: int, due: Segment | None) -> Growth:
    """What is to come of a request.

    Args:
        held: blocks that it holds.
        left: tokens until it ends; None where that is not known.
        computed: tokens that it has computed.
        due: the next segment that gives blocks back.
    """
    if due is None:
        return Growth(held, left)
    return Growth(held, left, max(0, due.due_at - computed), due.num_freed_blocks)
