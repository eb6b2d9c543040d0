from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.plan import (
    AUTO_PROMPT_TOKENS,
    SLACK_TOKENS,
    PlanTerms,
    RequestPlan,
    Rule,
    SkipReason,
    may_share,
    most_blocks,
    plan_request,
)
from mdkv_vllm.core.segment import SharedSegment

terms = st.builds(
    lambda block_size, strides, window, **more: PlanTerms(
        block_size=block_size, segment_tokens=strides * block_size, window=window, **more
    ),
    block_size=st.sampled_from([16, 32, 128]),
    strides=st.integers(4, 64),
    window=st.integers(1, 64),
    min_prompt_tokens=st.integers(1, 300),
    budget=st.floats(0.01, 1.0),
    rule=st.sampled_from(Rule),
    answers=st.booleans(),
    min_blocks=st.integers(1, 5),
    floor_tokens_per_page=st.none() | st.sampled_from([16, 31, 60, 112]),
)
prompts = st.integers(1, 20000)
TERMS = PlanTerms(16, 32, 256, 0.25, segment_tokens=512)


def some(plan, tokens=30000):
    """Its segments that are due within so many tokens."""
    return plan.due(tokens) if isinstance(plan, RequestPlan) else []


@given(prompts, terms)
def test_segments_lie_side_by_side_and_keep_their_last_blocks(prompt_tokens, terms):
    behind = 0
    for segment in some(plan_request(prompt_tokens, terms)):
        assert segment.first_block == behind
        assert segment.first_block < segment.first_lease_block < segment.end_block
        assert segment.num_lease_blocks >= terms.min_blocks
        if terms.floor_tokens_per_page is not None:
            pages = -(-segment.span_tokens // terms.floor_tokens_per_page)
            assert segment.num_lease_blocks >= pages + terms.min_blocks - 1
        behind = segment.end_block


@given(prompts, terms)
def test_a_window_lies_behind_its_boundary_and_is_computed_when_the_segment_is_ripe(
    prompt_tokens, terms
):
    for segment in some(plan_request(prompt_tokens, terms)):
        assert segment.ripe_at - segment.window_start == terms.window
        assert 0 <= segment.window_start - segment.end_token < terms.block_size
        generated = segment.ripe_at > prompt_tokens
        assert segment.part == ("answer" if generated else "prompt")
        assert segment.due_at - segment.ripe_at == (SLACK_TOKENS if generated else 0)


@given(prompts, terms)
def test_boundaries_follow_the_rule(prompt_tokens, terms):
    plan = plan_request(prompt_tokens, terms)
    if isinstance(plan, SkipReason):
        return
    inner = plan.prompt_segments[:-1]
    rolling = terms.rule is Rule.ROLLING or (
        terms.rule is Rule.AUTO and prompt_tokens > AUTO_PROMPT_TOKENS
    )
    assert rolling or not inner
    assert all(segment.span_tokens == terms.segment_tokens for segment in inner)
    if rolling and terms.answers:
        assert all(2 * s.span_tokens <= 3 * terms.segment_tokens for s in plan.prompt_segments)
    following = list(islice(plan.segments(), len(plan.prompt_segments), 8))
    assert all(segment.span_tokens == terms.segment_tokens for segment in following)
    assert terms.answers or (not following and len(plan.prompt_segments) == 1)


@given(prompts, terms, st.lists(st.integers(1, 3000), max_size=40), st.data())
def test_any_cut_of_the_same_tokens_gives_the_same_segments(prompt_tokens, terms, steps, data):
    """Steps of any size, tokens that are taken back, and a beginning from nothing."""
    plan = plan_request(prompt_tokens, terms)
    if isinstance(plan, SkipReason):
        return
    computed, compressed = 0, []
    for step in steps:
        what = data.draw(st.sampled_from(["compute", "compute", "compute", "reject", "preempt"]))
        if what == "preempt":
            computed, compressed = 0, []
        computed += step
        accepted = max(0, computed - data.draw(st.integers(0, 8))) if what == "reject" else computed
        compressed += plan.due(accepted)[len(compressed) :]
        computed = accepted
    assert compressed[: len(plan.due(computed))] == plan_request(prompt_tokens, terms).due(computed)


@given(prompts, terms, st.integers(0, 6000), st.integers(1, 4096), st.data())
def test_no_request_holds_more_than_declared(prompt_tokens, terms, answer, in_flight, data):
    """Blocks are freed for processed tokens alone, and allocated for scheduled ones."""
    plan, total = plan_request(prompt_tokens, terms), prompt_tokens + answer
    longest = total + data.draw(st.integers(0, 3000))
    most = most_blocks(terms, longest, in_flight)
    assert most <= -(-longest // terms.block_size)
    processed = held = 0
    while processed < total:
        due = some(plan, processed)
        behind = due[-1].end_block if due else 0
        scheduled = min(total, processed + data.draw(st.integers(1, in_flight)))
        held = sum(one.num_lease_blocks for one in due) - behind
        held += max(behind, -(-scheduled // terms.block_size))
        assert held <= most
        processed = data.draw(st.integers(processed + 1, scheduled))


@given(prompts, terms, st.integers(0, 3000), st.integers(1, 2048))
def test_the_peak_is_what_steps_reach(prompt_tokens, terms, answer, step):
    plan = plan_request(prompt_tokens, terms)
    if isinstance(plan, SkipReason):
        return
    total, processed, seen = prompt_tokens + answer, 0, 0
    while processed < total:
        due = plan.due(processed)
        behind = due[-1].end_block if due else 0
        scheduled = min(total, processed + step)
        blocks = max(behind, -(-scheduled // terms.block_size))
        seen = max(seen, sum(one.num_lease_blocks for one in due) + blocks - behind)
        processed = scheduled
    assert seen <= plan.peak_blocks(0, total, step)
    if step == 1:
        assert seen == plan.peak_blocks(0, total, step)


@given(prompts, terms)
def test_prompts_are_within_their_budget_and_use_it(prompt_tokens, terms):
    terms = replace(terms, min_blocks=1, floor_tokens_per_page=None)
    plan = plan_request(prompt_tokens, terms)
    if isinstance(plan, SkipReason) or not plan.prompt_segments:
        return
    smallest = any(segment.num_lease_blocks == 1 for segment in plan.prompt_segments)
    ends = plan.prompt_segments[-1].ripe_at == prompt_tokens
    if ends:
        assert smallest or plan.kept_share <= terms.budget + 1e-9
        lost = len(plan.prompt_segments) * terms.block_size / prompt_tokens
        assert plan.kept_share > terms.budget - lost - 1e-9


def test_full_budget_and_short_prompts_without_answers_are_left_alone():
    assert plan_request(4096, replace(TERMS, budget=1.0)) is SkipReason.FULL_BUDGET
    alone = replace(TERMS, answers=False)
    assert plan_request(255, alone) is SkipReason.TOO_SHORT
    assert isinstance(plan_request(256, alone), RequestPlan)
    assert plan_request(300, replace(alone, min_blocks=16)) is SkipReason.NO_SAVING


def test_a_prompt_of_one_segment():
    plan = plan_request(2048, TERMS)
    (segment,) = plan.prompt_segments
    assert (segment.first_lease_block, segment.end_block, segment.ripe_at) == (96, 126, 2048)
    assert plan.kept_share == 512 / 2048
    first = next(islice(plan.segments(), 1, None))
    assert (first.first_block, first.lease, first.ripe_at) == (126, (150, 158), 158 * 16 + 32)


def test_a_short_prompt_is_part_of_its_answers_first_segment():
    segment = next(plan_request(100, TERMS).segments())
    assert (segment.first_block, segment.end_token, segment.part) == (0, 512, "answer")


@pytest.mark.parametrize(
    ("prompt_tokens", "ends"),
    [(700, [668]), (799, [767]), (800, [512, 768]), (2048, [512, 1024, 1536, 2016])],
)
def test_a_rolling_prompts_last_segment_has_half_a_stride_at_least(prompt_tokens, ends):
    plan = plan_request(prompt_tokens, replace(TERMS, rule=Rule.ROLLING))
    found = [segment.end_token for segment in plan.prompt_segments]
    assert found == [end // 16 * 16 for end in ends]


@given(terms, st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 900)), max_size=6),
       st.integers(1, 2048), st.data())  # fmt: skip
def test_turns_that_share_hold_no_more_than_declared(terms, turns, in_flight, data):
    """Each reads what those before it published, and its own segments follow without a gap."""
    terms = replace(terms, shares=True, answers=True)
    size, shared, tokens = terms.block_size, (), 0
    for new, answer in turns:
        prompt, tokens = tokens + new, tokens + new + answer
        plan = plan_request(prompt, terms, shared)
        if isinstance(plan, SkipReason):
            continue
        own, behind = plan.due(tokens + 5000), plan.first_own_block
        for segment in own:
            assert segment.first_block == behind
            assert segment.first_block < segment.first_lease_block < segment.end_block
            behind = segment.end_block
        computed = plan.first_own_block * size
        while computed < tokens:
            due = [*shared, *plan.due(computed)]
            behind = due[-1].end_block if due else 0
            scheduled = min(tokens, computed + data.draw(st.integers(1, in_flight)))
            held = sum(one.num_lease_blocks for one in due)
            held += max(0, -(-scheduled // size) - behind)
            assert held <= most_blocks(terms, tokens, in_flight)
            computed = scheduled
        for segment in plan.due(tokens):
            if not may_share(segment, terms):
                break
            shared += (SharedSegment(segment.first_block, *segment.lease),)
        assert len(shared) <= 2 * tokens / terms.segment_tokens
