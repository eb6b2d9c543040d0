"""Pages per head."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.heads import HeadBudgets


@given(
    layers=st.integers(1, 6),
    heads=st.integers(1, 5),
    share=st.floats(0.01, 1.0),
    fullness=st.floats(0, 1.3),
    least=st.integers(0, 3),
    room=st.integers(1, 60),
    zeros=st.floats(0, 0.9),
    seed=st.integers(0, 999),
)
def test_every_page_goes_to_a_head_that_can_use_it(
    layers, heads, share, fullness, least, room, zeros, seed
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, heads, generator=generator) ** 6
    scores[torch.rand(layers, heads, generator=generator) < zeros] = 0
    scores[0, 0] = 0.5
    most, count = least + room, layers * heads
    total = least * count + round(fullness * room * count)
    pages = HeadBudgets(scores, share).pages(total, least, most)
    assert pages.shape == scores.shape
    assert int(pages.min()) >= least
    assert int(pages.max()) <= most
    assert int(pages.sum()) == min(total, most * count)
    # A higher score never means fewer pages, but for the rounding of one.
    order = scores.flatten().argsort()
    assert (pages.flatten()[order].diff() >= -1).all()


def test_the_formula_where_no_head_is_at_a_limit():
    scores = torch.tensor([[1.0, 3.0], [4.0, 2.0]])
    pages = HeadBudgets(scores, 0.5).pages(800, 0, 10_000)
    # b = 200 on average: half of it evenly, half by scores of 0.1, 0.3, 0.4 and 0.2.
    assert pages.tolist() == [[140, 220], [260, 180]]


def test_a_lower_power_brings_heads_together():
    scores = torch.tensor([[1.0, 9.0]])
    assert HeadBudgets(scores, 1.0, 0.5).pages(100, 0, 1000).tolist() == [[25, 75]]


def test_heads_of_one_rank_share_its_own_lease():
    budgets = HeadBudgets(torch.tensor([[1.0, 0.0, 3.0, 5.0]]), 1.0)
    assert budgets.of_part(slice(None), slice(2, 4)).pages(80, 0, 1000).tolist() == [[30, 50]]
    assert budgets.of_part(slice(None), slice(1, 2)).pages(8, 0, 10).tolist() == [
        [8]
    ]  # no score at all


def test_surplus_of_a_full_head_goes_to_the_others_in_proportion():
    scores = torch.tensor([[0.8, 0.1, 0.1]])
    pages = HeadBudgets(scores, 1.0).pages(100, 0, 40)
    assert pages.tolist() == [[40, 30, 30]]


def test_too_few_pages_are_refused():
    with pytest.raises(ValueError, match="fewer than 2 for each of 4 heads"):
        HeadBudgets(torch.ones(2, 2), 0.5).pages(7, 2, 9)
