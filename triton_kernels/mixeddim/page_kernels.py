"""Whole pages for every list, near what a pool's price says: one program per pool or list."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .allocate_kernels import (
    BELOW,
    FIRST_SHIFT,
    SLACK,
    STEPS,
    load_losses,
    next_digit,
    row_start,
)
from .select_kernel import (
    BITS,
    DIGITS,
    GREATEST,
    NEARLY,
    TILE,
    float_of_ordered,
    kth_largest,
    store_gains,
)


@triton.jit
def last_bracket(
    found, above, counts, costs, budgets, prices, OPTIONS: tl.constexpr, ROUNDS: tl.constexpr
):
    """The prices at which options are counted exactly. Grid: pools.

    Args:
        found: of the last round, int32 ``[pools]``; ``above`` and ``counts`` likewise; see
            :func:`.allocate_kernels.ask_prices`.
        prices: written, float64 ``[pools, 3]``: 0, and two between which pages suffice.
    """
    pool = tl.program_id(0)
    digits, _ = next_digit(
        found + pool, above + pool, counts + pool * (OPTIONS - 1) * DIGITS, costs,
        tl.load(budgets + pool), OPTIONS,
    )  # fmt: skip
    OPEN: tl.constexpr = FIRST_SHIFT - BITS * (ROUNDS - 1)
    low = tl.maximum((digits << OPEN) - SLACK, 0)
    high = tl.minimum(((digits + 1) << OPEN) + SLACK, GREATEST - 1)
    tl.store(prices + 3 * pool, 0.0)
    tl.store(prices + 3 * pool + 1, low.to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(prices + 3 * pool + 2, high.to(tl.float32, bitcast=True).to(tl.float64))


@triton.jit(do_not_specialize=["per_pool"])
def settle(
    prices, counts, totals, costs, capacity, budgets, pages, per_pool, wanted, paid, over, bounds,
    OPTIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A pool's price, what its lists want at it, and the dual's value. Grid: pools.

    Args:
        prices: float64 ``[pools, 3]``, see :func:`last_bracket`.
        counts: int32 ``[rows, 3, OPTIONS]``, tokens of each option at these.
        totals: float64 ``[rows, 3]``, least priced losses.
        capacity: int64 ``[OPTIONS]``, tokens of a page; 0 for dropping.
        budgets: float64 ``[pools]``, without what the cheapest lists' last pages may leave empty.
        pages: float64 ``[pools]``.
        wanted: written, int32 ``[rows, OPTIONS]``, the fewest pages that are considered.
        paid: written, float32 ``[rows, OPTIONS]``, price of a token.
        over: written, float32 ``[rows, OPTIONS]``, price of a token over that of option 0.
        bounds: written, float64 ``[pools]``.
        ROWS: a power of two, at least ``per_pool``.
    """
    pool = tl.program_id(0)
    inside = tl.arange(0, ROWS)
    row = pool * per_pool + inside
    exists = inside < per_pool
    asked_free, asked_low, asked_high = 0.0, 0.0, 0.0
    for option in tl.static_range(OPTIONS):
        cost = tl.load(costs + option)
        at = counts + row * 3 * OPTIONS + option
        asked_free += cost * tl.sum(tl.load(at, mask=exists, other=0), axis=0)
        asked_low += cost * tl.sum(tl.load(at + OPTIONS, mask=exists, other=0), axis=0)
        asked_high += cost * tl.sum(tl.load(at + 2 * OPTIONS, mask=exists, other=0), axis=0)
    budget = tl.load(budgets + pool)
    free = asked_free <= budget
    between = asked_low - asked_high
    left = tl.where(between > 0, (budget - asked_high) / tl.where(between > 0, between, 1.0), 0.0)
    left = tl.minimum(tl.maximum(left, 0.0), 1.0)
    high = tl.load(prices + 3 * pool + 2)
    price = tl.where(free, 0.0, high)
    dearest = tl.sum(tl.load(totals + row * 3 + 2, mask=exists, other=0.0), axis=0)
    cheapest = tl.sum(tl.load(totals + row * 3, mask=exists, other=0.0), axis=0)
    # At price 0 pages are free, which is a bound as well.
    tl.store(bounds + pool, tl.maximum(dearest - high * tl.load(pages + pool), cheapest))
    first_cost = tl.load(costs)
    for option in tl.static_range(OPTIONS):
        at = counts + row * 3 * OPTIONS + option
        at_free = tl.load(at, mask=exists, other=0).to(tl.float64)
        at_low = tl.load(at + OPTIONS, mask=exists, other=0).to(tl.float64)
        at_high = tl.load(at + 2 * OPTIONS, mask=exists, other=0).to(tl.float64)
        tokens = tl.where(free, at_free, at_high + left * (at_low - at_high))
        of_page = tl.maximum(tl.load(capacity + option), 1).to(tl.float64)
        whole = tl.floor(tokens / of_page).to(tl.int32) - BELOW
        cost = tl.load(costs + option)
        to = row * OPTIONS + option
        tl.store(wanted + to, tl.maximum(whole, 0), mask=exists)
        tl.store(paid + to, (price * cost + tl.zeros_like(tokens)).to(tl.float32), mask=exists)
        extra = price * (cost - first_cost) + tl.zeros_like(tokens)
        tl.store(over + to, extra.to(tl.float32), mask=exists)


@triton.jit
def sum_between(gains, length, low, high):
    """How many gains are above ``low``, int32, and the sum of those not above ``high``, float64.

    Args:
        gains: see :func:`.select_kernel.store_gains`; ``low`` and ``high`` are alike.
    """
    above = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE], tl.float32)
    for first in tl.range(0, length, TILE):
        bits = tl.load(gains + first + tl.arange(0, TILE))
        larger = bits > low
        above += larger.to(tl.int32)
        total += tl.where(larger & (bits <= high), float_of_ordered(bits), 0.0)
    return tl.sum(above, axis=0), tl.sum(total.to(tl.float64), axis=0)


@triton.jit
def last_in(gains, length, rank):
    """About the last of the ``rank`` largest gains; for none, more than all."""
    last = kth_largest(gains, length, tl.maximum(rank, 1), NEARLY)
    return tl.where(rank > 0, last, GREATEST)


@triton.jit
def left_over(rank, above, last):
    """What the gains above ``last`` lack of the sum of the ``rank`` largest, float64."""
    gain = float_of_ordered(last).to(tl.float64)
    return tl.where(rank > 0, (rank - above).to(tl.float64) * gain, 0.0)


@triton.jit(do_not_specialize=["heads", "span", "length"])
def page_costs(
    losses, heads, span, length, paid, capacity, wanted, gains, out, OPTIONS: tl.constexpr
):
    """Priced loss of giving a list its next pages. Grid: rows, options but the first.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        length: of a row of gains.
        paid: float32 ``[rows, OPTIONS]``, price of a token at each option.
        capacity: int64 ``[OPTIONS]``.
        wanted: int32 ``[rows, OPTIONS]``, pages that the list has already.
        gains: scratch, int32 ``[rows, OPTIONS - 1, length]``.
        out: written, float64 ``[rows, OPTIONS - 1, STEPS]``.
    """
    row = tl.program_id(0)
    index = tl.program_id(1) + 1
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    entry = row * (OPTIONS - 1) + tl.program_id(1)
    gains += tl.multiple_of(entry.to(tl.int64) * length, TILE)
    paid += row * OPTIONS
    for first in tl.range(0, length, TILE):
        token = first + tl.arange(0, TILE)
        exists = token < span
        other = tl.full([TILE], float("inf"), tl.float32)
        for option in tl.static_range(OPTIONS):
            priced = load_losses(start, stride, option, token, exists) + tl.load(paid + option)
            other = tl.where(index == option, other, tl.minimum(other, priced))
        own = load_losses(start, stride, index, token, exists)
        store_gains(gains, token, other - own, span)
    tl.debug_barrier()
    each = tl.load(capacity + index)
    price = tl.load(paid + index).to(tl.float64)
    pages = tl.load(wanted + row * OPTIONS + index).to(tl.int64)
    out += entry * STEPS
    high, left_before, rank_before = GREATEST, price * 0, pages * 0
    for step in tl.range(0, STEPS + 1):
        rank = tl.minimum((pages + step) * each, span)
        last = last_in(gains, length, rank)
        above, between = sum_between(gains, length, last, high)
        left = left_over(rank, above, last)
        gained = between + left - left_before
        tl.store(out + step - 1, (rank - rank_before) * price - gained, mask=step > 0)
        high, left_before, rank_before = last, left, rank


@triton.jit
def filled(pages, capacity, rest, room, row, exists, ranks, given, STORE: tl.constexpr,
           OPTIONS: tl.constexpr):  # fmt: skip
    """Pages that rows take when lists fill up, the richest first; tokens go to ``room``.

    Args:
        pages: pointer to int32 ``[rows, OPTIONS]``, the fewest of each list.
        capacity: int64 ``[OPTIONS]``.
        rest: int64 ``[ROWS]``, tokens there are.
        room: written if ``STORE``, int64 ``[rows, OPTIONS]``, tokens of each option.
        row: ``[ROWS]``, and which of them ``exists``.
        ranks: pointer to int32 ``[rows, OPTIONS - 1, STEPS]``.
        given: pages given, those of the lowest ranks.
    """
    total = tl.zeros_like(rest)
    for back in tl.static_range(OPTIONS - 1):
        index = OPTIONS - 1 - back
        held = tl.load(pages + row * OPTIONS + index, mask=exists, other=0).to(tl.int64)
        for step in tl.static_range(STEPS):
            at = ranks + (row * (OPTIONS - 1) + index - 1) * STEPS + step
            held += (tl.load(at, mask=exists, other=2147483647) < given).to(tl.int64)
        each = tl.load(capacity + index)
        tokens = tl.minimum(held * each, rest)
        rest -= tokens
        total += tl.where(exists, (tokens + each - 1) // each, 0)
        if STORE:
            tl.store(room + row * OPTIONS + index, tokens, mask=exists)
    each = tl.load(capacity)
    total += tl.where(exists & (each > 0), (rest + each - 1) // tl.maximum(each, 1), 0)
    if STORE:
        tl.store(room + row * OPTIONS, rest, mask=exists)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["per_pool", "span"])
def give_pages(
    costs, capacity, wanted, pages, per_pool, span, ranks, room, OPTIONS: tl.constexpr,
    ROWS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Give the cheapest pages first, as many as all fit. Grid: pools.

    Args:
        costs: float64 ``[rows, OPTIONS - 1, STEPS]``, see :func:`page_costs`.
        capacity: int64 ``[OPTIONS]``.
        wanted: int32 ``[rows, OPTIONS]``.
        pages: float64 ``[pools]``.
        ranks: scratch, int32 like ``costs``.
        room: written, int64 ``[rows, OPTIONS]``, tokens that each option may hold; option 0 takes
            the rest.
        ROWS: a power of two, at least ``per_pool``.
        NUMBERS: a power of two, at least the pages of a pool that are open to choice.
    """
    pool = tl.program_id(0)
    count = per_pool * (OPTIONS - 1) * STEPS
    number = tl.arange(0, NUMBERS)
    own = tl.load(costs + pool * count + number, mask=number < count, other=0.0)
    rank = tl.zeros([NUMBERS], tl.int32)
    for other in tl.range(0, count):
        cost = tl.load(costs + pool * count + other)
        rank += ((cost < own) | ((cost == own) & (other < number))).to(tl.int32)
    tl.store(ranks + pool * count + number, rank, mask=number < count)
    tl.debug_barrier()
    inside = tl.arange(0, ROWS)
    row = pool * per_pool + inside
    exists = inside < per_pool
    rest = tl.zeros([ROWS], tl.int64) + span
    most = tl.load(pages + pool)
    best = 0
    for given in tl.range(1, count + 1):
        taken = filled(wanted, capacity, rest, room, row, exists, ranks, given, False, OPTIONS)
        best = tl.where(taken.to(tl.float64) <= most, given, best)
    filled(wanted, capacity, rest, room, row, exists, ranks, best, True, OPTIONS)
