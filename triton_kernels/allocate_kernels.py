"""Passes over tokens that :mod:`mdkv_vllm.triton_kernels.allocate` is made of.

A row is one KV head of one layer; a program takes a row from its first token to its last, in an
order that does not change, so that a prompt gives the same pages in every run. Order statistics are
found by their bits: four at a time, sixteen thresholds are counted in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(512)
"""Tokens at a time."""

COUNT_TILE = tl.constexpr(256)
"""Tokens at a time where every option is counted, in float64."""

NUM_WARPS = 8
"""Sixteen counts of a tile then take 32 registers a thread."""

PRICES = tl.constexpr(16)
"""Prices tried in one pass."""

LOWEST = tl.constexpr(-(2**31))

ALL, CHEAPER, HELD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a list's gains are over; see :func:`list_gains`."""


@triton.jit
def row_start(losses, row, heads, span, OPTIONS: tl.constexpr):
    """Pointer to a row's losses at option 0; options lie ``heads * span`` elements apart."""
    row = row.to(tl.int64)
    return losses + (row // heads * OPTIONS * heads + row % heads) * span


@triton.jit
def load_losses(start, stride, option, token, exists):
    """A tile of losses at one option."""
    return tl.load(start + stride * option + token, mask=exists, other=0)


@triton.jit
def cheapest(start, stride, costs, prices, token, exists, OPTIONS: tl.constexpr):
    """Least priced loss of each token at each price, and what its option costs.

    Args:
        start: of the row; see :func:`row_start`.
        stride: elements from option to option.
        costs: pages that a token takes at each option, ``[OPTIONS]``.
        prices: of a page, ``[prices, 1]``, in the type in which to calculate.
        token: ``[tokens]``.
        exists: which of them do.

    Returns:
        Two tensors ``[prices, tokens]``; the first among equals.
    """
    cost = tl.load(costs).to(prices.dtype)
    losses = load_losses(start, stride, 0, token, exists).to(prices.dtype)
    least = losses[None, :] + cost * prices
    taken = cost + tl.zeros_like(least)
    for option in tl.static_range(1, OPTIONS):
        cost = tl.load(costs + option).to(prices.dtype)
        losses = load_losses(start, stride, option, token, exists).to(prices.dtype)
        priced = losses[None, :] + cost * prices
        taken = tl.where(priced < least, cost, taken)
        least = tl.minimum(least, priced)
    return least, taken


@triton.jit(do_not_specialize=["heads", "span", "rows_per_pool"])
def ask_pages(losses, heads, span, rows_per_pool, costs, prices, pages, OPTIONS: tl.constexpr):
    """Pages that each row would take at some prices. Grid: rows.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        costs: float64 ``[OPTIONS]``, pages that a token takes.
        prices: float32 ``[pools, PRICES]``, of a page.
        pages: written, float32 ``[rows, PRICES]``.
    """
    row = tl.program_id(0)
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    number = tl.arange(0, PRICES)
    price = tl.load(prices + row // rows_per_pool * PRICES + number)[:, None]
    asked = tl.zeros([PRICES, TILE], tl.float32)
    for first in tl.range(0, span, TILE):
        token = first + tl.arange(0, TILE)
        exists = token < span
        _, taken = cheapest(start, stride, costs, price, token, exists, OPTIONS)
        asked += tl.where(exists[None, :], taken, 0.0)
    tl.store(pages + row * PRICES + number, tl.sum(asked, axis=1))


@triton.jit(do_not_specialize=["heads", "span", "rows_per_pool"])
def count_options(
    losses,
    heads,
    span,
    rows_per_pool,
    costs,
    prices,
    counts,
    totals,
    OPTIONS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Options that a row's tokens choose at a price, in float64. Grid: rows, prices.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        costs: float64 ``[OPTIONS]``, pages that a token takes, all different.
        prices: float64 ``[pools, prices]``, of a page.
        counts: written, int32 ``[rows, prices, OPTIONS]``.
        totals: written, float64 ``[rows, prices]``: summed least priced losses.
        PADDED: a power of two, at least OPTIONS.
    """
    row = tl.program_id(0)
    number = tl.num_programs(1)
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    at = prices + row // rows_per_pool * number + tl.program_id(1)
    price = tl.load(at + tl.zeros([1, 1], tl.int32))
    option = tl.arange(0, PADDED)
    cost = tl.load(costs + option, mask=option < OPTIONS, other=-1.0)[:, None]
    held = tl.zeros([PADDED, COUNT_TILE], tl.int32)
    total = tl.zeros([1, COUNT_TILE], tl.float64)
    for first in tl.range(0, span, COUNT_TILE):
        token = first + tl.arange(0, COUNT_TILE)
        exists = token < span
        least, taken = cheapest(start, stride, costs, price, token, exists, OPTIONS)
        total += tl.where(exists[None, :], least, 0.0)
        held += ((taken == cost) & exists[None, :]).to(tl.int32)
    out = row * number + tl.program_id(1)
    tl.store(counts + out * OPTIONS + option, tl.sum(held, axis=1), mask=option < OPTIONS)
    tl.store(totals + out, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["heads", "span"])
def list_gains(
    losses,
    heads,
    span,
    prices,
    held,
    gains,
    LIST: tl.constexpr,
    OPTIONS: tl.constexpr,
    OVER: tl.constexpr,
    DROP: tl.constexpr,
):
    """What each token would gain by being in a list. Grid: token tiles, rows.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        prices: float32 ``[rows, OPTIONS]``, of a token at each option.
        held: int8 ``[rows, span]``, option of each token.
        gains: written, float32 ``[rows, span]``.
        LIST: the list's option.
        OVER: ``ALL``: over the best of all other options at their prices, the list itself being
            free; ``CHEAPER``: over those before the list, prices paid, for tokens at option 0;
            ``HELD``: over the option that a token is at, nothing paid, where it gains. Minus
            infinity for all other tokens.
        DROP: whether option 0 has room for any number; ``CHEAPER`` is then for those who gain.
    """
    row = tl.program_id(1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = token < span
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    at = row.to(tl.int64) * span + token
    prices += row * OPTIONS
    own = load_losses(start, stride, LIST, token, exists)
    if OVER == HELD:
        now = tl.load(held + at, mask=exists, other=0)
        gain = load_losses(start, stride, now.to(tl.int64), token, exists) - own
        gain = tl.where((now != LIST) & (gain > 0), gain, float("-inf"))
    else:
        other = tl.full([TILE], float("inf"), tl.float32)
        for option in tl.static_range(OPTIONS):
            if option < LIST or (OVER == ALL and option != LIST):
                priced = load_losses(start, stride, option, token, exists)
                other = tl.minimum(other, priced + tl.load(prices + option))
        if OVER == ALL:
            gain = other - own
        else:
            gain = other - (own + tl.load(prices + LIST))
            open_to_it = tl.load(held + at, mask=exists, other=0) == 0
            if DROP:
                open_to_it = open_to_it & (gain >= 0)
            gain = tl.where(open_to_it, gain, float("-inf"))
    tl.store(gains + at, gain, mask=exists)


@triton.jit
def ordered(x):
    """int32 that compare as float32 do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of_ordered(bits):
    """Inverse of :func:`ordered`, for one number."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_ordered(row, first, span):
    """A tile of a row of gains, by :func:`ordered`; the least integer where there is no token."""
    token = first + tl.arange(0, TILE)
    exists = token < span
    x = ordered(tl.load(row + token, mask=exists, other=0))
    return tl.where(exists, x, LOWEST)


@triton.jit
def kth_largest(row, span, rank):
    """The ``rank``-th largest of a row of gains, by :func:`ordered`; 1 is the largest.

    Args:
        row: pointer to float32 ``[span]``.
        rank: from 1 to ``span``.
    """
    found = tl.full([1], LOWEST, tl.int64)
    for step in tl.range(0, 8):
        steps = tl.arange(0, 16).to(tl.int64) << (28 - 4 * step)
        threshold = (found + steps).to(tl.int32)
        counts = tl.zeros([16, TILE], tl.int32)
        for first in tl.range(0, span, TILE):
            x = load_ordered(row, first, span)
            counts += (x[None, :] >= threshold[:, None]).to(tl.int32)
        # The first threshold is what was found before, which is low enough.
        enough = (tl.sum(counts, axis=1) >= rank) | (steps == 0)
        found += tl.max(tl.where(enough, steps, 0), axis=0)
    return tl.max(found, axis=0).to(tl.int32)


@triton.jit(do_not_specialize=["span"])
def top_sums(gains, span, ranks, sums):
    """Sum of the largest gains of a row. Grid: rows, ranks.

    Args:
        gains: float32 ``[rows, span]``.
        ranks: int64 ``[rows, ranks]``, how many, from 0 to ``span``.
        sums: written, float64 ``[rows, ranks]``.
    """
    row = gains + tl.program_id(0).to(tl.int64) * span
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    rank = tl.load(ranks + at)
    last = kth_largest(row, span, tl.maximum(rank, 1))
    count = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE], tl.float64)
    for first in tl.range(0, span, TILE):
        token = first + tl.arange(0, TILE)
        larger = load_ordered(row, first, span) > last
        gain = tl.load(row + token, mask=token < span, other=0).to(tl.float64)
        total += tl.where(larger, gain, 0.0)
        count += larger.to(tl.int32)
    equal = (rank - tl.sum(count, axis=0)).to(tl.float64)
    total = tl.sum(total, axis=0) + equal * float_of_ordered(last).to(tl.float64)
    tl.store(sums + at, tl.where(rank > 0, total, 0.0))


@triton.jit(do_not_specialize=["span"])
def clear_list(
    gains, span, room, prices, LIST: tl.constexpr, OPTIONS: tl.constexpr, DROP: tl.constexpr
):
    """Set a list's price so that as many tokens want it as have room. Grid: rows.

    Args:
        gains: float32 ``[rows, span]``, over all other options.
        room: int64 ``[rows, OPTIONS]``, tokens of each option.
        prices: float32 ``[rows, OPTIONS]``, of which the list's is written.
        DROP: whether lists may stay part empty, so that no price is negative.
    """
    row = gains + tl.program_id(0).to(tl.int64) * span
    at = tl.program_id(0) * OPTIONS + LIST
    rank = tl.load(room + at)
    last = kth_largest(row, span, tl.maximum(rank, 1))
    count = tl.zeros([TILE], tl.int32)
    below = tl.full([TILE], LOWEST, tl.int32)
    for first in tl.range(0, span, TILE):
        x = load_ordered(row, first, span)
        count += (x >= last).to(tl.int32)
        below = tl.maximum(below, tl.where(x < last, x, LOWEST))
    first_out = tl.where(tl.sum(count, axis=0) > rank, last, tl.max(below, axis=0))
    last_in = float_of_ordered(last)
    price = last_in
    if rank == 0:
        price = last_in + tl.abs(last_in) + 1e-30
    elif rank < span:
        price = (last_in + float_of_ordered(first_out)) / 2
    if DROP:
        price = tl.maximum(price, 0.0)
    tl.store(prices + at, price)


@triton.jit(do_not_specialize=["span"])
def fill_list(gains, span, room, held, LIST: tl.constexpr):
    """Give a list the tokens that gain most, earlier ones among equals. Grid: rows.

    Args:
        gains: float32 ``[rows, span]``; minus infinity for tokens that are not to be had.
        room: int64 ``[rows]``, how many at most.
        held: int8 ``[rows, span]``, option of each token; written for those chosen.
    """
    number = tl.program_id(0).to(tl.int64)
    row = gains + number * span
    held += number * span
    rank = tl.load(room + number)
    last = kth_largest(row, span, tl.maximum(rank, 1))
    count = tl.zeros([TILE], tl.int32)
    for first in tl.range(0, span, TILE):
        count += (load_ordered(row, first, span) > last).to(tl.int32)
    equals = rank - tl.sum(count, axis=0)
    for first in tl.range(0, span, TILE):
        token = first + tl.arange(0, TILE)
        x = load_ordered(row, first, span)
        gain = tl.load(row + token, mask=token < span, other=float("-inf"))
        equal = (x == last).to(tl.int32)
        chosen = (x > last) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= equals))
        chosen = chosen & (gain > float("-inf"))
        tl.store(held + token, tl.full([TILE], LIST, tl.int8), mask=chosen)
        equals -= tl.sum(equal, axis=0)
