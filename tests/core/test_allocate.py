import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.allocate import allocate
from mdkv_vllm.core.formats import FormatSet, PageFormat, PageGeometry, Rotation, parse_formats

GEOMETRY = PageGeometry(16, 64, torch.bfloat16)


def toy_format(name, tokens_per_page):
    return PageFormat(name, 4, 16, Rotation.IDENTITY, tokens_per_page, quantised=False)


def convex_losses(options, heads, span, drop):
    """Losses that fall as formats get richer, heavy-tailed over tokens as attention is."""
    scale = torch.rand(1, heads, span).pow(8) * 10 + 1e-4
    steps = torch.rand(options, heads, span).sort(0, descending=True).values
    losses = scale * steps
    losses[-1] = 0
    return losses


@given(
    st.sampled_from(
        [
            ("drop", "i4", "i8", "full"),
            ("i2", "i4", "i8", "full"),
            ("drop", "full"),
            ("i4", "full"),
            ("drop", "r8", "r16", "full"),
        ]
    ),
    st.integers(1, 4),
    st.integers(20, 600),
    st.floats(0, 1),
    st.integers(0, 10_000),
)
def test_every_page_is_paid_for_and_every_token_placed(names, heads, span, fraction, seed):
    torch.manual_seed(seed)
    formats = parse_formats(names, GEOMETRY)
    losses = convex_losses(len(formats.names), heads, span, formats.drop)
    cheapest = 0 if formats.drop else heads * formats.formats[0].pages(span)
    dearest = heads * formats.formats[-1].pages(span)
    num_pages = cheapest + round(fraction * (dearest - cheapest))
    result = allocate(losses, formats, num_pages)
    capacity = torch.tensor([f.tokens_per_page for f in formats.formats])
    used = ((result.tokens + capacity - 1) // capacity).sum()
    assert int(used) <= num_pages
    lists = torch.stack([(result.choice == f).sum(1) for f in range(len(capacity))], 1)
    assert torch.equal(lists, result.tokens)
    if formats.drop:
        assert int(result.choice.min()) >= -1
    else:
        assert int(result.choice.min()) >= 0
        assert torch.equal(result.tokens.sum(1), torch.full((heads,), span))
    option = result.choice + int(formats.drop)
    assert result.objective == pytest.approx(float(losses.gather(0, option[None]).double().sum()))
    assert result.objective >= result.lower_bound - 1e-3 * abs(result.lower_bound) - 1e-6


def test_page_budget_is_met_exactly_and_near_the_bound_on_long_prompts():
    for names in (("drop", "i4", "i8", "full"), ("i2", "i4", "i8", "full")):
        formats = parse_formats(names, GEOMETRY)
        losses = convex_losses(len(names), 3, 4000, formats.drop)
        for num_pages in (230, 300, 400):
            result = allocate(losses, formats, num_pages)
            capacity = torch.tensor([f.tokens_per_page for f in formats.formats])
            assert int(((result.tokens + capacity - 1) // capacity).sum()) == num_pages
            assert result.objective <= 1.05 * result.lower_bound


def test_against_exhaustive_search():
    """Tiny instances, every assignment tried: never better than the optimum, rarely far."""
    formats = FormatSet((toy_format("a", 3), toy_format("b", 1)), drop=True)
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        losses = convex_losses(3, 2, 4, drop=True)
        best = torch.inf
        for options in itertools.product(range(3), repeat=8):
            option = torch.tensor(options).view(2, 4)
            pages = sum(
                -(-int((option[h] == 1).sum()) // 3) + int((option[h] == 2).sum()) for h in (0, 1)
            )
            if pages <= 4:
                best = min(best, float(losses.gather(0, option[None]).sum()))
        found = allocate(losses, formats, 4).objective
        assert found >= best - 1e-5
        ratios.append(found / best)
    assert sorted(ratios)[20] < 1.3


def test_too_few_pages_without_drop_is_an_error():
    formats = parse_formats(("i4", "full"), GEOMETRY)
    with pytest.raises(ValueError, match="cannot hold"):
        allocate(torch.rand(2, 3, 100), formats, 5)
