"""Segments of prompts, for tests and benchmarks that have no server's settings."""

from __future__ import annotations

from mdkv_vllm.core.plan import PlanTerms, RequestPlan, Rule, plan_request
from mdkv_vllm.core.segment import Segment


def prompt_segments(
    tokens: int,
    block_size: int,
    window: int,
    budget: float,
    min_blocks: int = 1,
    segment_tokens: int | None = None,
) -> tuple[Segment, ...]:
    """Segments of a prompt; none where its budget keeps everything, or they would save nothing.

    Args:
        tokens: its length.
        block_size: tokens of a block.
        window: tokens behind the last segment.
        budget: share of the bytes to keep.
        min_blocks: blocks of the smallest lease.
        segment_tokens: of each segment; None for one that takes all.
    """
    rule = Rule.PROMPT if segment_tokens is None else Rule.ROLLING
    terms = PlanTerms(
        block_size, window, 1, budget, segment_tokens or tokens, rule, True, min_blocks
    )
    plan = plan_request(tokens, terms)
    return plan.prompt_segments if isinstance(plan, RequestPlan) else ()


def whole_prompt(
    tokens: int,
    block_size: int,
    window: int,
    budget: float,
    min_blocks: int = 1,
    floor_tokens_per_page: int | None = None,
) -> Segment:
    """The only segment of a prompt; see :func:`prompt_segments`.

    Args:
        tokens: its length.
        block_size: tokens of a block.
        window: tokens behind it.
        budget: share of the bytes to keep.
        min_blocks: blocks of the smallest lease.
        floor_tokens_per_page: tokens per page of the cheapest format where none may be dropped.
    """
    terms = PlanTerms(
        block_size, window, 1, budget, tokens, Rule.PROMPT, False, min_blocks, floor_tokens_per_page
    )
    plan = plan_request(tokens, terms)
    assert isinstance(plan, RequestPlan)
    (segment,) = plan.prompt_segments
    return segment
