"""Passes over tokens that :mod:`mdkv_vllm.kernels.triton.allocate` is made of.

A row is one KV head of one layer, a pool some rows that share pages. What programs add up together
are integers, so that a prompt gives the same pages in every run whatever their order.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(512)
"""Tokens at a time."""

COUNT_TILE = tl.constexpr(256)
"""Tokens at a time where every option is counted, in float64."""

SHARE = 4096
"""Tokens of a program that counts."""

NUM_WARPS = 8
"""Sixteen counts of a tile then take 32 registers a thread."""

PRICES = tl.constexpr(16)
"""Prices tried in one pass."""

STEPS = tl.constexpr(3)
"""Pages of a list that are open to choice."""

BELOW = tl.constexpr(1)
"""How many of them lie below what it wants."""

RANGE = tl.constexpr(40.0)
"""Powers of two from the highest price that any token could pay down to where the search starts."""


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
def bracket(brackets, counts, costs, budget, OPTIONS: tl.constexpr):
    """The prices, as base-2 logarithms, between which a pool's pages suffice, after one more round.

    Args:
        brackets: pointer to float64 ``[2]`` of the pool: those before the round.
        counts: pointer to int32 ``[PRICES, OPTIONS]`` of the pool: tokens of each option at the
            prices between them.
        costs: float64 ``[OPTIONS]``, pages that a token takes.
        budget: of the pool.
    """
    low = tl.load(brackets)
    step = (tl.load(brackets + 1) - low) / (PRICES + 1)
    number = tl.arange(0, PRICES)
    asked = tl.zeros([PRICES], tl.float64)
    for option in tl.static_range(OPTIONS):
        tokens = tl.load(counts + number * OPTIONS + option).to(tl.float64)
        asked += tokens * tl.load(costs + option)
    above = tl.sum((asked > budget).to(tl.int32), axis=0)
    return low + step * above, low + step * (above + 1)


@triton.jit(do_not_specialize=["heads", "span", "rows_per_pool", "round"])
def ask_options(
    losses, heads, span, rows_per_pool, costs, budgets, most, per_page, brackets, counts, round,
    OPTIONS: tl.constexpr, PADDED: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Count the options that tokens choose at ``PRICES`` prices of their pool. Grid: shares, rows.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        costs: float64 ``[OPTIONS]``, pages that a token takes, all different.
        budgets: float64 ``[pools]``.
        most: float32 ``[pools]``, the highest loss.
        per_page: tokens of the largest page, of which a page's price follows.
        brackets: float64 ``[rounds, pools, 2]``, base-2 logarithms of prices between which a round
            searches; each writes its own.
        counts: int32 ``[rounds, pools, PRICES, OPTIONS]``, zero; this round's are added to.
        round: which.
        PADDED: a power of two, at least OPTIONS.
    """
    row = tl.program_id(1)
    pool = row // rows_per_pool
    pools = tl.num_programs(1) // rows_per_pool
    size: tl.constexpr = PRICES * OPTIONS
    if round == 0:
        high = tl.log2(tl.load(most + pool).to(tl.float64) * per_page + 1e-30)
        low = high - RANGE
    else:
        before = (round - 1) * pools + pool
        low, high = bracket(
            brackets + 2 * before, counts + before * size, costs, tl.load(budgets + pool), OPTIONS
        )
    tl.store(brackets + 2 * (round * pools + pool), low)
    tl.store(brackets + 2 * (round * pools + pool) + 1, high)
    number = tl.arange(0, PRICES)
    price = tl.exp2(low + (high - low) / (PRICES + 1) * (number + 1)).to(tl.float32)[:, None]
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    counts += (round * pools + pool) * size
    held = tl.zeros([PRICES, PADDED], tl.int32)
    column = tl.arange(0, PADDED)[None, :]
    begin = tl.program_id(0) * SHARE
    for first in tl.range(begin, tl.minimum(begin + SHARE, span), TILE):
        token = first + tl.arange(0, TILE)
        exists = token < span
        _, taken = cheapest(start, stride, costs, price, token, exists, OPTIONS)
        for option in tl.static_range(OPTIONS):
            cost = tl.load(costs + option).to(tl.float32)
            mine = ((taken == cost) & exists[None, :]).to(tl.int32)
            held += tl.where(column == option, tl.sum(mine, axis=1)[:, None], 0)
    tl.atomic_add(counts + number[:, None] * OPTIONS + column, held, mask=column < OPTIONS)


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
