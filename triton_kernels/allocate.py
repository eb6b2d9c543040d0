"""Allocation on the device: what :mod:`mdkv_vllm.core.allocate` does, without waiting for a result.

The price of a page is found by bisection, several prices at a time. Around that solution every list
is given whole pages, those that cost least first, as many as there are; the total is
exact by construction. Then every list gets a price of its own at which as many tokens want it
as it has room for, found one list after the other (an assignment's dual, by coordinates), and
takes those that gain most. The reference searches more choices of pages and assigns tokens
optimally; the tests measure how far behind this stays.

Sums that decide are of integers, so that a prompt gives the same pages in every run.
"""

from __future__ import annotations

from functools import cache

import torch

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.formats import FormatSet

_PRICES, _ROUNDS = 8, 13
"""Prices tried at a time, and how often: some 40 bisections."""

_PAGES_BELOW, _PAGES_ABOVE = 1, 2
"""Pages of a list that are open to choice, around what it wants rounded down."""

_CLEARINGS = 8
"""Rounds in which every list's price is set anew."""

_FIXED_POINT = 2.0**40


@cache
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is copied to the device once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def allocate(losses: torch.Tensor, formats: FormatSet, num_pages: int) -> Allocation:
    """Choose a format for every token of a layer within ``num_pages`` pages.

    Args:
        losses: ``[options, kv_heads, span]`` of any float type; options in the order of
            ``formats.names``.
        formats: the formats allowed.
        num_pages: pages the layer's lists may take together; never more are taken.

    Returns:
        As the reference; objective and bound are float64 tensors of one element. The bound is the
        dual's value at the price found, a little below its best where nothing may be dropped.

    Raises:
        ValueError: nothing may be dropped and the cheapest format does not fit.
    """
    _, heads, span = losses.shape
    if not formats.drop and heads * formats.formats[0].pages(span) > num_pages:
        raise ValueError(f"{num_pages} pages cannot hold {span} tokens without dropping any")
    losses = losses.double()
    capacity = (0,) * formats.drop + tuple(f.tokens_per_page for f in formats.formats)
    # Option 0 takes what the others leave: where it is a list, its last page may be part empty.
    spare = 0.0 if formats.drop else heads * (1 - 1 / capacity[0])
    costs = _constant(
        tuple(1 / c if c else 0.0 for c in capacity), torch.float64, losses.device
    ).view(-1, 1, 1)
    price, option = _lagrangian(losses, costs, capacity, num_pages - spare)
    least, _ = _cheapest(losses, costs * price)
    # At price 0 pages are free, which is a bound as well.
    lower_bound = torch.maximum(least.sum() - price * num_pages, losses.amin(0).sum())
    room = _whole_pages(losses + costs * price, option, capacity, num_pages)
    option = _assign(losses, costs * price, room, formats.drop)
    objective = losses.gather(0, option.unsqueeze(0)).sum()
    tokens = _counts(option, len(capacity))[:, int(formats.drop) :]
    return Allocation(option - int(formats.drop), tokens, objective, lower_bound)


def _cheapest(losses: torch.Tensor, prices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least priced loss of each token and its option, the first among equals.

    Args:
        losses: ``[options, ...]``.
        prices: ``[options, ...]``, broadcast to them.
    """
    least = losses[0] + prices[0]
    option = torch.zeros_like(least, dtype=torch.int64)
    for index in range(1, losses.shape[0]):
        priced = losses[index] + prices[index]
        option = torch.where(priced < least, index, option)
        least = torch.minimum(least, priced)
    return least, option


def _counts(option: torch.Tensor, options: int) -> torch.Tensor:
    """Tokens of each option: int64 ``[..., options]`` of ``[..., span]``."""
    return torch.stack([(option == index).sum(-1) for index in range(options)], -1)


def _lagrangian(
    losses: torch.Tensor, costs: torch.Tensor, capacity: tuple[int, ...], budget: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least price of a page at which ``budget`` pages suffice, tokens taking any share of one.

    Returns:
        float64, one element; and options, int64 ``[kv_heads, span]``, when the pages left at that
        price are given to tokens that would take them at any lower one.
    """
    device, options = losses.device, len(capacity)
    per_page = [1 / c if c else 0.0 for c in capacity]
    dearer = [cost - per_page[0] for cost in per_page if cost > per_page[0]]
    high = losses.amax() / min(dearer, default=1.0) + 1e-30
    low = high * 1e-12
    steps = _constant(tuple(i / (_PRICES + 1) for i in range(_PRICES + 2)), torch.float64, device)
    flat = costs.flatten()

    def suffices(prices: torch.Tensor) -> torch.Tensor:
        _, option = _cheapest(losses.unsqueeze(1), costs.unsqueeze(1) * prices.view(-1, 1, 1))
        return (_counts(option, options).sum(1) * flat).sum(-1) <= budget

    for _ in range(_ROUNDS):
        edges = low * (high / low) ** steps
        above = (~suffices(edges[1:-1])).sum().view(1)
        low, high = (edges.index_select(0, above + i).squeeze(0) for i in (0, 1))
    free = suffices(torch.zeros_like(low).view(1))[0]
    low, high = (torch.where(free, 0.0, price) for price in (low, high))
    _, option = _cheapest(losses, costs * high)
    _, richer = _cheapest(losses, costs * low)
    whole = (flat * _FIXED_POINT).round().long()
    left = budget * _FIXED_POINT - whole[option].sum()
    more = (whole[richer] - whole[option]).flatten().cumsum(0).view_as(option)
    return high, torch.where(more <= left, richer, option)


def _whole_pages(
    priced: torch.Tensor, option: torch.Tensor, capacity: tuple[int, ...], num_pages: int
) -> torch.Tensor:
    """Tokens that each option may hold, int64 ``[kv_heads, options]``; option 0 takes the rest.

    Lists start below what they want. Giving one of them another page costs priced loss: that of
    the tokens that would come next. The cheapest pages are given first, as long as all fit.
    """
    heads, span = option.shape
    lists = _constant(capacity[1:], torch.int64, option.device)
    base = (_counts(option, len(capacity))[:, 1:] // lists - _PAGES_BELOW).clamp_min(0)
    step = torch.arange(_PAGES_BELOW + _PAGES_ABOVE + 1, device=option.device)
    peak = priced.amax() + 1e-30
    costs = []
    for index in range(1, len(capacity)):
        gains = ((_others(priced, index) - priced[index]) / peak).sort(dim=1, descending=True)
        total = (gains.values * _FIXED_POINT).round().long().cumsum(1)
        total = torch.cat((torch.zeros_like(total[:, :1]), total), 1)
        ends = (base[:, index - 1 : index] + step) * capacity[index]
        costs.append(-total.gather(1, ends.clamp_max(span)).diff(dim=1))
    cost = torch.stack(costs, 1) if costs else base.new_zeros(heads, 0, len(step) - 1)
    rank = cost.flatten().argsort(stable=True).argsort().view_as(cost)
    given = torch.arange(cost.numel() + 1, device=option.device)
    pages = base + (rank < given.view(-1, 1, 1, 1)).sum(-1)
    room = _filled(pages, capacity, span)
    taken = sum(-(room[..., i] // -c) for i, c in enumerate(capacity) if c)
    fits = taken.sum(-1) <= num_pages
    most = torch.where(fits, given, 0).amax().view(1)
    return room.index_select(0, most).squeeze(0)


def _filled(pages: torch.Tensor, capacity: tuple[int, ...], span: int) -> torch.Tensor:
    """Tokens per option, ``[..., options]``, when lists of those pages fill up, the richest first.

    Args:
        pages: int64 ``[..., lists]``.
        capacity: tokens per page of each option.
        span: tokens there are.
    """
    rest = torch.full_like(pages.sum(-1), span)
    room = []
    for index in range(len(capacity) - 1, 0, -1):
        room.append(torch.minimum(pages[..., index - 1] * capacity[index], rest))
        rest = rest - room[-1]
    return torch.stack((rest, *reversed(room)), -1)


def _others(priced: torch.Tensor, index: int) -> torch.Tensor:
    """Least priced loss among the other options."""
    return torch.cat((priced[:index], priced[index + 1 :])).amin(0)


def _assign(
    losses: torch.Tensor, prices: torch.Tensor, room: torch.Tensor, drop: bool
) -> torch.Tensor:
    """Fill the lists: int64 ``[kv_heads, span]``.

    Args:
        losses: float64 ``[options, kv_heads, span]``.
        prices: where the lists' prices start from, float64 ``[options, 1, 1]``.
        room: tokens of each option, int64 ``[kv_heads, options]``.
        drop: whether lists may stay part empty, option 0 taking any number.
    """
    options, heads, span = losses.shape
    prices = (prices - prices[0]).expand(options, heads, 1).clone()
    for _ in range(_CLEARINGS):
        for index in range(options - 1, 0, -1):
            gains = _others(losses + prices, index) - losses[index]
            cleared = _clearing_price(gains, room[:, index : index + 1])
            prices[index] = cleared.clamp_min(0) if drop else cleared
    priced = losses + prices
    option = torch.zeros(heads, span, dtype=torch.int64, device=losses.device)
    for index in range(options - 1, 0, -1):
        gains = priced[:index].amin(0) - priced[index]
        taken = (option > 0) | (gains < 0) if drop else option > 0
        picked = _best(gains.masked_fill(taken, -torch.inf), room[:, index : index + 1])
        option = torch.where(picked & ~taken, index, option)
    # What room is left goes to those who gain by it, whatever it was to cost.
    for index in range(options - 1, 0, -1):
        now = losses.gather(0, option.unsqueeze(0)).squeeze(0)
        gains = now - losses[index]
        left = room[:, index : index + 1] - (option == index).sum(1, keepdim=True)
        waiting = (option != index) & (gains > 0)
        picked = _best(gains.masked_fill(~waiting, -torch.inf), left)
        option = torch.where(picked & waiting, index, option)
    return option


def _clearing_price(gains: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Price at which so many tokens of each row gain more: ``[rows, 1]`` of ``[rows, span]``."""
    span = gains.shape[1]
    ranked = gains.sort(dim=1, descending=True).values
    last_in = ranked.gather(1, (room - 1).clamp_min(0))
    first_out = ranked.gather(1, room.clamp_max(span - 1))
    price = torch.where(room > 0, (last_in + first_out) / 2, last_in + last_in.abs() + 1e-30)
    return torch.where(room < span, price, last_in)


def _best(gains: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which tokens of each row are among its ``count`` largest gains, earlier ones among equals."""
    order = gains.argsort(dim=1, descending=True, stable=True)
    within = torch.arange(gains.shape[1], device=gains.device) < count
    return torch.zeros_like(within).scatter_(1, order, within)
