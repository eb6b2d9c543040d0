from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.plan import LeasePlan, LeaseTerms, SkipReason, plan_lease

terms = st.builds(
    LeaseTerms,
    block_size=st.sampled_from([16, 32, 128]),
    window=st.integers(1, 64),
    min_prompt_tokens=st.integers(65, 300),
    budget=st.floats(0.01, 1.0),
    min_blocks=st.integers(1, 5),
    floor_tokens_per_page=st.none() | st.sampled_from([16, 31, 60, 112]),
)


@given(st.integers(1, 20000), terms)
def test_plan_is_within_budget_and_leaves_the_window_alone(prompt_tokens, terms):
    plan = plan_lease(prompt_tokens, terms)
    if isinstance(plan, SkipReason):
        return
    assert 0 < plan.first_lease_block < plan.tail_block
    assert plan.span_tokens <= prompt_tokens - terms.window
    assert prompt_tokens - terms.window - plan.span_tokens < terms.block_size
    assert plan.num_lease_blocks >= terms.min_blocks
    if terms.floor_tokens_per_page is None and plan.num_lease_blocks > terms.min_blocks:
        assert plan.kept_share <= terms.budget + 1e-9
    else:
        assert plan.kept_share < 1


@given(st.integers(300, 20000), terms)
def test_plan_uses_the_budget(prompt_tokens, terms):
    plan = plan_lease(prompt_tokens, terms)
    if isinstance(plan, LeasePlan):
        assert plan.kept_share > terms.budget - (terms.block_size / prompt_tokens) - 1e-9


def test_full_budget_and_short_prompts_are_left_alone():
    terms = LeaseTerms(block_size=16, window=32, min_prompt_tokens=256, budget=1.0)
    assert plan_lease(4096, terms) is SkipReason.FULL_BUDGET
    terms = LeaseTerms(block_size=16, window=32, min_prompt_tokens=256, budget=0.3)
    assert plan_lease(255, terms) is SkipReason.TOO_SHORT
    assert isinstance(plan_lease(256, terms), LeasePlan)


def test_worked_example():
    terms = LeaseTerms(block_size=16, window=32, min_prompt_tokens=256, budget=0.25)
    plan = plan_lease(2048, terms)
    assert (plan.first_lease_block, plan.tail_block) == (96, 126)
    assert plan.kept_share == 512 / 2048
