import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.allocate import allocate
from mdkv_vllm.core.exchange import Exchange
from mdkv_vllm.core.formats import (
    FormatSet,
    Kind,
    PageFormat,
    PageGeometry,
    Rotation,
    parse_formats,
)

GEOMETRY = PageGeometry(16, 64, torch.bfloat16)


def toy_format(name, tokens_per_page):
    return PageFormat(name, Kind.SLOTS, 4, 16, Rotation.IDENTITY, tokens_per_page)


TOY_FORMATS = (toy_format("a", 4), toy_format("b", 2), toy_format("c", 1))


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
            assert result.objective <= 1.01 * result.lower_bound


@pytest.mark.parametrize("drop", [True, False])
def test_against_exhaustive_search(drop):
    """Tiny instances, every assignment tried; the optimum rarely lies outside the box."""
    names = (toy_format("a", 3), toy_format("b", 1)) if drop else TOY_FORMATS
    formats = FormatSet(names, drop)
    capacity = torch.tensor([0] * drop + [f.tokens_per_page for f in formats.formats])
    every = torch.tensor(list(itertools.product(range(3), repeat=8))).view(-1, 2, 4)
    counts = torch.stack([(every == o).sum(-1) for o in range(3)], -1)
    pages = torch.where(capacity > 0, -(-counts // capacity.clamp_min(1)), 0).sum((1, 2))
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        losses = convex_losses(3, 2, 4, drop)
        summed = losses.unsqueeze(0).expand(len(every), -1, -1, -1)
        summed = summed.gather(1, every.unsqueeze(1)).sum((1, 2, 3))
        for num_pages in (3, 4, 5):
            best = float(summed[pages <= num_pages].min())
            ratios.append(allocate(losses, formats, num_pages).objective / best)
    assert min(ratios) >= 1 - 1e-5
    assert sum(ratio > 1 + 1e-5 for ratio in ratios) <= 2


def test_equal_losses_share_the_pages():
    """At the critical price every token of the layer changes its mind at once."""
    formats = parse_formats(("drop", "i4", "i8", "full"), GEOMETRY)
    for rows in ([2.0, 1.0, 0.4, 0.0], [2.0, 1.0, 0.9, 0.0]):
        losses = torch.tensor(rows)[:, None, None].expand(4, 3, 2000).contiguous()
        for num_pages in (20, 100, 170):
            result = allocate(losses, formats, num_pages)
            assert result.objective <= 1.02 * result.lower_bound


def test_just_enough_pages_hold_every_token():
    formats = parse_formats(("i2", "i4", "i8", "full"), GEOMETRY)
    for span in (992, 1000, 1984):
        least = 3 * formats.formats[0].pages(span)
        losses = convex_losses(4, 3, span, drop=False)
        for spare in range(4):
            result = allocate(losses, formats, least + spare)
            assert int(result.choice.min()) >= 0


@given(st.integers(2, 6), st.integers(8, 60), st.integers(0, 10_000))
def test_an_exchange_leaves_nothing_to_gain(options, span, seed):
    """No cycle of moves lowers the loss, which is what being optimal for its counts means."""
    torch.manual_seed(seed)
    losses = torch.rand(options, span).double()
    filling = Exchange(losses, (losses + torch.rand(options, 1)).argmin(0))
    for _ in range(4):
        parts = torch.rand(options) + 1e-3
        counts = (parts / parts.sum() * span).long()
        counts[0] += span - counts.sum()
        filling.move_to(counts.tolist())
        option = torch.tensor(filling.option)
        assert filling.counts == counts.tolist() == option.bincount(minlength=options).tolist()
        summed = losses.gather(0, option[None]).sum()
        assert filling.objective == pytest.approx(float(summed))
        distance = torch.full((options, options), torch.inf, dtype=torch.float64)
        for a in range(options):
            if (option == a).any():
                distance[a] = (losses - losses[a])[:, option == a].amin(1)
        for middle in range(options):
            distance = torch.minimum(distance, distance[:, middle, None] + distance[middle])
        assert distance.diagonal().min() >= -1e-9


def test_too_few_pages_without_drop_is_an_error():
    formats = parse_formats(("i4", "full"), GEOMETRY)
    with pytest.raises(ValueError, match="cannot hold"):
        allocate(torch.rand(2, 3, 100), formats, 5)
