"""What the scheduler's manager remembers of a request that holds blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm.v1.request import Request

from mdkv_vllm.core.admission import Growth
from mdkv_vllm.core.plan import RequestPlan, SkipReason
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.plugin.shared_prefixes import Prefix


@dataclass
class Resident:
    """A request that holds blocks.

    Attributes:
        request: vLLM's.
        plan: its segments, or why it has none.
        unfreed: those that come after ``due``.
        due: the next one that gives blocks back.
        ends_at: tokens that it has at most.
        path: the segments so far that others may read; None where a next one is not for others.
        computed: tokens that are known to be computed.
        freed: blocks that it does not hold, though they stand in its table.
        written: segments that the worker compresses in this step at the latest.
        written_in: this step's number.
    """

    request: Request
    plan: RequestPlan | SkipReason
    unfreed: Iterator[Segment]
    due: Segment | None
    ends_at: int
    path: Prefix | None
    computed: int = 0
    freed: int = 0
    written: list[Segment] = field(default_factory=list)
    written_in: int = 0

    def growth(self, blocks: int) -> Growth:
        """What is to come of it.

        Args:
            blocks: of its table, those given back among them.
        """
        left = max(0, self.ends_at - self.computed)
        return growth_of(blocks - self.freed, left, self.computed, self.due)

    def free(self, segment: Segment) -> None:
        """Go on to the segment behind one whose blocks are given back."""
        self.freed += freed_blocks(segment)
        self.written.append(segment)
        self.due = next(self.unfreed, None)


def segments_of(plan: RequestPlan | SkipReason) -> Iterator[Segment]:
    """The segments of a request, none where it stays uncompressed."""
    return plan.segments() if isinstance(plan, RequestPlan) else iter(())


def freed_blocks(segment: Segment) -> int:
    """Blocks that a segment gives back."""
    return segment.num_blocks - segment.num_lease_blocks


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
    return Growth(held, left, max(0, due.due_at - computed), freed_blocks(due))
