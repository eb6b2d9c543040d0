"""Passes over tokens that :mod:`mdkv_vllm.kernels.triton.allocate` is made of.

A row is one KV head of one layer, a pool some rows that share pages. What programs add up together
are integers, so that a prompt gives the same pages in every run whatever their order.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .select_kernel import BITS, DIGITS, TILE, bytes_of, count, totals

COUNT_TILE = tl.constexpr(256)
"""Tokens at a time where every option is counted, in float64."""

SHARE = 8192
"""Tokens of a program that counts: fewer than fill a counter."""

NUM_WARPS = 8

ROUNDS = 6
"""Digits of a price that are found. What they leave open is one part in 65,536."""

FIRST_SHIFT = tl.constexpr(27)
"""Bits of a price below its first digit; its sign is not among them."""

SLACK = tl.constexpr(8)
"""Float32 numbers by which rounded prices may be off."""

STEPS = tl.constexpr(3)
"""Pages of a list that are open to choice."""

BELOW = tl.constexpr(1)
"""How many of them lie below what it wants."""


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


@triton.jit
def next_digit(found, above, counts, costs, budget, OPTIONS: tl.constexpr):
    """One more digit of the highest price at which a pool's tokens ask for too many pages.

    Args:
        found: pointer to int32, the digits before.
        above: pointer to float64, pages asked for at higher prices than have these digits.
        counts: pointer to int32 ``[OPTIONS - 1, DIGITS]`` of the pool; see :func:`ask_prices`.
        costs: float64 ``[OPTIONS]``, pages that a token takes.
        budget: of the pool.

    Returns:
        The digits, and the pages asked for at higher prices than have them.
    """
    digit = tl.arange(0, DIGITS)
    pages = tl.zeros([DIGITS], tl.float64)
    for option in tl.static_range(1, OPTIONS):
        more = tl.load(costs + option) - tl.load(costs + option - 1)
        pages += tl.load(counts + (option - 1) * DIGITS + digit).to(tl.float64) * more
    before = tl.load(above)
    asked = tl.cumsum(pages, axis=0, reverse=True)
    # No price above all tokens' is of use, even if the cheapest option is too dear for all of them.
    too_many = (before + asked > budget) & (asked > 0)
    chosen = tl.maximum(tl.sum(too_many.to(tl.int32), axis=0) - 1, 0)
    higher = before + tl.sum(tl.where(digit > chosen, pages, 0.0), axis=0)
    return tl.load(found) * DIGITS + chosen, higher


@triton.jit
def price_to_leave(
    start, stride, per_page, token, exists, OPTION: tl.constexpr, OPTIONS: tl.constexpr
):
    """The price of a page from which tokens take no option as dear as one, ``[tokens]``.

    Option ``k`` beats a cheaper ``i`` where what it saves is worth more than its extra pages: below
    the price ``(loss_i - loss_k) / (cost_k - cost_i)``. A token takes ``OPTION`` or a dearer one
    where one of these beats all those before ``OPTION``.

    Args:
        start: pointer to the row's losses at option 0; options lie ``stride`` elements apart.
        per_page: float32 ``[OPTIONS, OPTIONS]``, reciprocals of the differences of costs.
    """
    highest = tl.zeros(token.shape, tl.float32)
    for dear in tl.static_range(OPTION, OPTIONS):
        own = load_losses(start, stride, dear, token, exists)
        worth = tl.full(token.shape, float("inf"), tl.float32)
        for cheap in tl.static_range(OPTION):
            saved = load_losses(start, stride, cheap, token, exists) - own
            worth = tl.minimum(worth, saved * tl.load(per_page + cheap * OPTIONS + dear))
        highest = tl.maximum(highest, worth)
    return highest


@triton.jit(do_not_specialize=["heads", "span", "rows_per_pool", "round"])
def ask_prices(
    losses, heads, span, rows_per_pool, costs, per_page, budgets, found, above, counts, round,
    OPTIONS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Count the next digits of the prices at which tokens leave options. Grid: shares, rows.

    A token's pages at a price follow from how many of its prices are higher. So the price of a pool
    is an order statistic of weighted numbers, found digit by digit.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        costs: float64 ``[OPTIONS]``, pages that a token takes, rising.
        per_page: see :func:`price_to_leave`.
        budgets: float64 ``[pools]``.
        found: int32 ``[rounds, pools]``, digits before a round; each writes its own.
        above: float64 ``[rounds, pools]``, pages asked for at prices above these digits.
        counts: int32 ``[rounds, pools, OPTIONS - 1, DIGITS]``, zero; this round's are added to.
        round: which.
    """
    row = tl.program_id(1)
    pool = row // rows_per_pool
    pools = tl.num_programs(1) // rows_per_pool
    digits = 0
    asked = tl.load(costs) * (span * rows_per_pool)  # at any price
    own = round * pools + pool
    if round > 0:
        before = own - pools
        digits, asked = next_digit(
            found + before, above + before, counts + before * (OPTIONS - 1) * DIGITS, costs,
            tl.load(budgets + pool), OPTIONS,
        )  # fmt: skip
    tl.store(found + own, digits)
    tl.store(above + own, asked)
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    counts += own * (OPTIONS - 1) * DIGITS
    shift = FIRST_SHIFT - BITS * round
    begin = tl.program_id(0) * SHARE
    for option in tl.static_range(1, OPTIONS):
        low = tl.zeros([TILE], tl.int32)
        high = tl.zeros([TILE], tl.int32)
        for first in tl.range(begin, tl.minimum(begin + SHARE, span), TILE):
            token = first + tl.arange(0, TILE)
            exists = token < span
            price = price_to_leave(start, stride, per_page, token, exists, option, OPTIONS)
            place = (price.to(tl.int32, bitcast=True) >> shift) - digits * DIGITS
            low, high = count(low, high, tl.where(exists, place, -1))
        to = counts + (option - 1) * DIGITS + tl.arange(0, DIGITS)
        tl.atomic_add(to, totals(bytes_of(low, high)))


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
