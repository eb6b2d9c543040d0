"""The plan of a request: its segments and which of their blocks stay, as pure functions.

vLLM's scheduler frees blocks and its worker rewrites them, in different processes.
Both compute the same plan from the same few numbers, so no message passes between them.

    tokens   |<------- segment 0: whole blocks ------->|<-- segment 1 -->| ... |<- tail ->|
    blocks   | freed: keep their hash        | lease   | freed  | lease  | ... | full     |
             0                   first_lease_block     end_block

A segment is ripe when the ``window`` tokens behind its boundary are computed: their queries score
it. One that ripens within a prompt is compressed at once, between two steps. Those of answers,
which may ripen together in many requests, may each wait for :data:`SLACK_TOKENS` more tokens of
their request, so that steps share the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import chain, count, takewhile

from mdkv_vllm.core.segment import PARTS, Segment, SegmentBlocks, SharedSegment

SLACK_TOKENS = 32
"""Tokens that a request may compute after a segment of its answer is ripe before that segment is
compressed."""
AUTO_PROMPT_TOKENS = 8192
"""The longest prompt that is one segment where the rule is :attr:`Rule.AUTO`."""


class Rule(Enum):
    """Where the segments of a prompt end; those of an answer always follow every stride."""

    AUTO = "auto"
    """One segment up to :data:`AUTO_PROMPT_TOKENS`, else rolling."""
    ROLLING = "rolling"
    """At every multiple of the stride, and at the prompt's end less the window."""
    PROMPT = "prompt"
    """At the prompt's end less the window alone."""


class SkipReason(Enum):
    """Why a request stays uncompressed."""

    DISABLED = "disabled"
    """Compression is off on this server."""
    FULL_BUDGET = "full_budget"
    """Its budget keeps everything."""
    TOO_SHORT = "too_short"
    """Its prompt has fewer than ``min_prompt_tokens`` tokens, and its answer is not compressed."""
    NO_SAVING = "no_saving"
    """Page table, formats and whole blocks leave nothing to give back."""
    SHARED_BLOCKS = "shared_blocks"
    """A prefix-cache hit covers blocks that its lease would have to write."""
    SESSION = "session"
    """Its prompt grows later (streaming input)."""
    NOT_GENERATION = "not_generation"
    """It is a pooling request."""


@dataclass(frozen=True)
class PlanTerms:
    """What a plan depends on besides the prompt: fixed for a server, or set per request.

    Attributes:
        block_size: tokens in one vLLM block.
        window: tokens behind a boundary that score the segment before it; a prompt's last ones.
        min_prompt_tokens: a prompt of fewer, behind a shared prefix, has no boundary at its end.
        budget: share of the KV bytes to keep, in (0, 1]; 1 means no compression.
        segment_tokens: the stride, a multiple of ``block_size``.
        rule: where the segments of a prompt end.
        answers: whether answers are compressed; without, a prompt is one segment, the only one.
        min_blocks: blocks a lease needs whatever the budget (page table, prompt basis).
        floor_tokens_per_page: tokens per page of the cheapest format where no token may be
            dropped, which bounds a lease from below; None where dropping is allowed.
        shares: whether requests read the leases of others.
    """

    block_size: int
    window: int
    min_prompt_tokens: int
    budget: float
    segment_tokens: int
    rule: Rule = Rule.AUTO
    answers: bool = True
    min_blocks: int = 1
    floor_tokens_per_page: int | None = None
    shares: bool = False

    @property
    def stride(self) -> int:
        """Blocks of a segment that does not end with a prompt."""
        return self.segment_tokens // self.block_size


@dataclass(frozen=True)
class RequestPlan:
    """The segments of a request, however many tokens it gets to.

    Attributes:
        prompt_tokens: length of its prompt.
        terms: everything else that they depend on.
        shared: segments of a cached prefix, without a gap from its first token; its own follow.
    """

    prompt_tokens: int
    terms: PlanTerms
    shared: tuple[SharedSegment, ...] = ()

    @property
    def first_own_block(self) -> int:
        """Where its own segments begin."""
        return self.shared[-1].end_block if self.shared else 0

    @cached_property
    def prompt_segments(self) -> tuple[Segment, ...]:
        """Those that ripen with the prompt."""
        terms, segments = self.terms, list[Segment]()
        boundaries = self._prompt_boundaries()
        for end in boundaries:
            first = segments[-1].end_block if segments else self.first_own_block
            last = end == boundaries[-1]
            covered = self.prompt_tokens if last else end * terms.block_size
            ripe_at = self.prompt_tokens if last else covered + terms.window
            made = _segment(first, end, covered, ripe_at, self.prompt_tokens, terms)
            if made is None:
                break
            segments.append(made)
        return tuple(segments)

    def segments(self) -> Iterator[Segment]:
        """Its own in order, without an end where answers are compressed."""
        yield from self.prompt_segments
        terms = self.terms
        if not terms.answers:
            return
        own = self.prompt_segments
        begin = own[-1].end_block if own else self.first_own_block
        for end in count(begin + terms.stride, terms.stride):
            covered = end * terms.block_size
            ripe_at = covered + terms.window
            made = _segment(end - terms.stride, end, covered, ripe_at, self.prompt_tokens, terms)
            if made is None:
                return
            yield made

    @property
    def first_lease_block(self) -> int | None:
        """Where its own first lease will begin, whenever that is; None where it never has one."""
        first = next(self.segments(), None)
        return first.first_lease_block if first else None

    def ripe(self, computed_tokens: int) -> list[Segment]:
        """Those that may be compressed after so many computed tokens."""
        return list(takewhile(lambda one: one.ripe_at <= computed_tokens, self.segments()))

    def due(self, computed_tokens: int) -> list[Segment]:
        """Those that are compressed for certain, and whose blocks may be freed."""
        return list(takewhile(lambda one: one.due_at <= computed_tokens, self.segments()))

    def blocks_held(self, computed_tokens: int) -> int:
        """Blocks that are held after so many computed tokens, when everything due is freed."""
        due: list[SegmentBlocks] = [*self.shared, *self.due(computed_tokens)]
        behind = due[-1].end_block if due else 0
        blocks = max(-(-computed_tokens // self.terms.block_size), behind)
        return sum(one.num_lease_blocks for one in due) + blocks - behind

    def peak_blocks(self, computed_tokens: int, until_tokens: int, step_tokens: int) -> int:
        """The most blocks that are held while a request is computed step by step.

        Args:
            computed_tokens: from where on.
            until_tokens: up to where.
            step_tokens: of every step.
        """
        size, most = self.terms.block_size, 0
        leases, behind = sum(one.num_lease_blocks for one in self.shared), self.first_own_block
        for segment in chain(self.segments(), [None]):
            due_at = until_tokens + 1 if segment is None else segment.due_at
            # As late as a step can be before the segment's blocks are freed.
            last = min(due_at - 1 + step_tokens, until_tokens)
            if last > computed_tokens:
                most = max(most, leases + -(-last // size) - behind)
            if segment is None or due_at > until_tokens:
                break
            leases, behind = leases + segment.num_lease_blocks, segment.end_block
        return most

    @property
    def kept_share(self) -> float:
        """Bytes kept of the prompt, leases and what is behind them, over its full bytes."""
        size = self.terms.block_size
        freed = sum(one.num_freed_blocks for one in (*self.shared, *self.prompt_segments))
        return 1 - freed * size / self.prompt_tokens

    def _prompt_boundaries(self) -> list[int]:
        """Blocks at which the prompt's segments end, if they save anything."""
        terms, begin = self.terms, self.first_own_block
        own_tokens = self.prompt_tokens - begin * terms.block_size
        if own_tokens < max(terms.min_prompt_tokens, terms.window + 1):
            return []
        end = (self.prompt_tokens - terms.window) // terms.block_size
        rolling = terms.rule is Rule.ROLLING or (
            terms.rule is Rule.AUTO and own_tokens > AUTO_PROMPT_TOKENS
        )
        if not rolling or not terms.answers:
            return [end]
        # The last one is not much shorter than a stride: half of it at least.
        inner = range(begin + terms.stride, end - terms.stride // 2 + 1, terms.stride)
        return [*inner, end]


def plan_request(
    prompt_tokens: int, terms: PlanTerms, shared: tuple[SharedSegment, ...] = ()
) -> RequestPlan | SkipReason:
    """Plan a request's segments, or say why it never has any.

    The budget covers all that a segment's tokens hold: its lease (with page table and prompt
    basis) and, of the segment that ends a prompt, the prompt's full-dimension rest. It is met from
    below, in whole blocks, except that a lease is never smaller than ``min_blocks`` nor than its
    formats' floor.

    Args:
        prompt_tokens: length of the prompt.
        terms: everything else the plan depends on.
        shared: segments of a cached prefix that it reads.
    """
    if terms.budget >= 1:
        return SkipReason.FULL_BUDGET
    plan = RequestPlan(prompt_tokens, terms, shared)
    if plan.first_lease_block is not None:
        return plan
    short = prompt_tokens < max(terms.min_prompt_tokens, terms.window + 1)
    return SkipReason.TOO_SHORT if short else SkipReason.NO_SAVING


def most_blocks(terms: PlanTerms, tokens: int, in_flight_tokens: int) -> int:
    """Blocks that no request of so many tokens or fewer ever holds more than.

    Args:
        terms: its terms.
        tokens: of prompt and answer together.
        in_flight_tokens: that may be scheduled beyond those that are known to be computed.
    """
    size, full = terms.block_size, -(-tokens // terms.block_size)
    rate = _lease_rate(terms)
    if rate is None:
        return full
    leases = int(rate * full) + 1 + terms.min_blocks
    behind = terms.window + SLACK_TOKENS + in_flight_tokens + 2 * size
    rolled = leases + (3 * terms.segment_tokens // 2 + behind) // size
    whole = {Rule.ROLLING: 0, Rule.AUTO: AUTO_PROMPT_TOKENS, Rule.PROMPT: tokens}[terms.rule]
    # A prompt that is one segment has no lease before it ends, but those of a shared prefix.
    before = leases if terms.shares else 0
    return min(full, max(rolled, before + (whole + behind) // size))


def may_share(segment: Segment, terms: PlanTerms) -> bool:
    """Whether others may read a segment's lease.

    Not if it is short, for they would add up to more leases than kernels have room for, nor if
    it is larger than its budget, for they would add up to more blocks than :func:`most_blocks`.
    """
    rate = _lease_rate(terms)
    if rate is None or 2 * segment.num_blocks < terms.stride:
        return False
    return segment.num_lease_blocks <= rate * segment.num_blocks


def _lease_rate(terms: PlanTerms) -> float | None:
    """Share of its blocks that a segment of one stride or more keeps; None without such."""
    stride = _lease_blocks(terms.stride, terms.segment_tokens, terms)
    if terms.budget >= 1 or not terms.answers or stride is None:
        return None
    rate = max(stride / terms.stride, terms.budget)
    if terms.floor_tokens_per_page is not None:
        rate = max(rate, terms.block_size / terms.floor_tokens_per_page)
    return rate


def _segment(
    first: int, end: int, covered: int, ripe_at: int, prompt_tokens: int, terms: PlanTerms
) -> Segment | None:
    """A segment of the blocks ``first .. end - 1``; None where it would save nothing.

    Args:
        first: its first block.
        end: one past its last.
        covered: position behind the last token that its share of the budget covers.
        ripe_at: see :class:`Segment`.
        prompt_tokens: length of the prompt.
        terms: the request's.
    """
    lease = _lease_blocks(end - first, covered - first * terms.block_size, terms)
    if lease is None:
        return None
    size, generated = terms.block_size, ripe_at > prompt_tokens
    due_at = ripe_at + SLACK_TOKENS if generated else ripe_at
    start = ripe_at - terms.window
    return Segment(first, end - lease, end, size, start, ripe_at, due_at, PARTS[generated])


def _lease_blocks(blocks: int, covered_tokens: int, terms: PlanTerms) -> int | None:
    """Blocks that a segment keeps; None where it would save nothing.

    Args:
        blocks: of the segment.
        covered_tokens: that its share of the budget covers, those behind it among them.
        terms: the request's.
    """
    span_tokens = blocks * terms.block_size
    rest = covered_tokens - span_tokens
    affordable = int((terms.budget * covered_tokens - rest) // terms.block_size)
    lease = max(affordable, terms.min_blocks)
    if terms.floor_tokens_per_page is not None:
        floor = terms.min_blocks - 1 + -(-span_tokens // terms.floor_tokens_per_page)
        lease = max(lease, floor)
    return lease if lease < blocks else None
