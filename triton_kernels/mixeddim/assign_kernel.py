"""Tokens to lists with room for so many: every list's price is set in turn, then all are filled.

One program has a row (a KV head of a layer) from the first round to the last, so that the rounds
are one launch.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .allocate_kernels import load_losses, row_start
from .select_kernel import (
    LEAST,
    NEARLY,
    TILE,
    float_of_ordered,
    kth_largest,
    store_gains,
)

ALL, CHEAPER, HELD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a list's gains are over; see :func:`write_gains`."""


@triton.jit
def write_gains(
    start, stride, span, length, prices, held, gains, LIST: tl.constexpr, OPTIONS: tl.constexpr,
    OVER: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """What each token of a row would gain by being in a list.

    Args:
        start: pointer to the row's losses at option 0; options lie ``stride`` elements apart.
        prices: pointer to float32 ``[OPTIONS]``, of a token at each option.
        held: pointer to int8 ``[span]``, option of each token.
        gains: pointer to int32 ``[length]``, written; see :func:`.select_kernel.store_gains`.
        LIST: the list's option.
        OVER: ``ALL``: over the best of all other options at their prices, the list itself being
            free; ``CHEAPER``: over those before the list, prices paid, for tokens at option 0;
            ``HELD``: over the option that a token is at, nothing paid, where it gains. Minus
            infinity for all other tokens.
        DROP: whether option 0 has room for any number; ``CHEAPER`` is then for those who gain.
    """
    tl.debug_barrier()
    for first in tl.range(0, length, TILE):
        token = first + tl.arange(0, TILE)
        exists = token < span
        own = load_losses(start, stride, LIST, token, exists)
        if OVER == HELD:
            now = tl.load(held + token, mask=exists, other=0)
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
                open_to_it = tl.load(held + token, mask=exists, other=0) == 0
                if DROP:
                    open_to_it = open_to_it & (gain >= 0)
                gain = tl.where(open_to_it, gain, float("-inf"))
        store_gains(gains, token, gain, span)
    tl.debug_barrier()


@triton.jit
def clear_list(gains, length, rank, price_at, DROP: tl.constexpr):
    """Set a list's price so that about as many tokens want it as have room.

    Args:
        gains: pointer to int32 ``[length]``, over all other options; see :func:`write_gains`.
        rank: tokens that it has room for.
        price_at: pointer to its price, written.
        DROP: whether lists may stay part empty, so that no price is negative.
    """
    last_in = float_of_ordered(kth_largest(gains, length, tl.maximum(rank, 1), NEARLY))
    price = tl.where(rank == 0, last_in + tl.abs(last_in) + 1e-30, last_in)
    if DROP:
        price = tl.maximum(price, 0.0)
    tl.store(price_at, price)


@triton.jit
def fill_list(gains, length, rank, held, LIST: tl.constexpr):
    """Give a list the tokens that gain most, earlier ones among equals.

    Args:
        gains: pointer to int32 ``[length]``, see :func:`write_gains`; minus infinity for tokens
            that are not to be had.
        rank: how many at most.
        held: pointer to int8 ``[span]``, option of each token; written for those chosen.
    """
    last = kth_largest(gains, length, tl.maximum(rank, 1))
    above = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for first in tl.range(0, length, TILE):
        x = tl.load(gains + first + tl.arange(0, TILE))
        above += (x > last).to(tl.int32)
        equal += (x == last).to(tl.int32)
    equals = rank - tl.sum(above, axis=0)
    if (last > LEAST) & (equals < tl.sum(equal, axis=0)):
        for first in tl.range(0, length, TILE):
            token = first + tl.arange(0, TILE)
            x = tl.load(gains + token)
            same = (x == last).to(tl.int32)
            chosen = (x > last) | ((same > 0) & (tl.cumsum(same, axis=0) <= equals))
            tl.store(held + token, tl.full([TILE], LIST, tl.int8), mask=chosen)
            equals -= tl.sum(same, axis=0)
    else:
        for first in tl.range(0, length, TILE):
            token = first + tl.arange(0, TILE)
            x = tl.load(gains + token)
            chosen = (x >= last) & (x > LEAST)
            tl.store(held + token, tl.full([TILE], LIST, tl.int8), mask=chosen)


@triton.jit
def count_held(held, span, option):
    """Tokens of a row at an option, int64."""
    count = tl.zeros([TILE], tl.int64)
    for first in tl.range(0, span, TILE):
        token = first + tl.arange(0, TILE)
        count += (tl.load(held + token, mask=token < span, other=-1) == option).to(tl.int64)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["heads", "span", "length", "rounds"])
def assign(
    losses, heads, span, length, room, prices, rounds, gains, choice, tokens, objective,
    OPTIONS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill the lists of a row. Grid: rows.

    Args:
        losses: float32 ``[layers, OPTIONS, heads, span]``.
        room: int64 ``[rows, OPTIONS]``, tokens of each option.
        prices: float32 ``[rows, OPTIONS]``, where the lists' prices start from; written.
        rounds: in which every list's price is set anew.
        length: of a row of gains.
        gains: scratch, int32 ``[rows, length]``.
        choice: written, int8 ``[rows, span]``: the option, less ``DROP``.
        tokens: written, int64 ``[rows, OPTIONS - DROP]``.
        objective: written, float64 ``[rows]``.
        DROP: 1 where option 0 is to drop, with room for any number; else 0.
    """
    row = tl.program_id(0)
    start = row_start(losses, row, heads, span, OPTIONS)
    stride = heads.to(tl.int64) * span
    gains += tl.multiple_of(row.to(tl.int64) * length, TILE)
    held = choice + row.to(tl.int64) * span
    room += row * OPTIONS
    prices += row * OPTIONS
    for first in tl.range(0, span, TILE):
        token = first + tl.arange(0, TILE)
        tl.store(held + token, tl.zeros([TILE], tl.int8), mask=token < span)
    for _ in tl.range(0, rounds):
        for back in tl.static_range(OPTIONS - 1):
            write_gains(
                start, stride, span, length, prices, held, gains, OPTIONS - 1 - back, OPTIONS, ALL,
                DROP,
            )  # fmt: skip
            rank = tl.load(room + OPTIONS - 1 - back)
            clear_list(gains, length, rank, prices + OPTIONS - 1 - back, DROP)
    for back in tl.static_range(OPTIONS - 1):
        write_gains(
            start, stride, span, length, prices, held, gains, OPTIONS - 1 - back, OPTIONS, CHEAPER,
            DROP,
        )  # fmt: skip
        fill_list(gains, length, tl.load(room + OPTIONS - 1 - back), held, OPTIONS - 1 - back)
    # What room is left goes to those who gain by it, whatever it was to cost.
    for back in tl.static_range(OPTIONS - 1):
        write_gains(
            start, stride, span, length, prices, held, gains, OPTIONS - 1 - back, OPTIONS, HELD,
            DROP,
        )  # fmt: skip
        left = tl.load(room + OPTIONS - 1 - back) - count_held(held, span, OPTIONS - 1 - back)
        fill_list(gains, length, left, held, OPTIONS - 1 - back)
    tl.debug_barrier()
    for option in tl.static_range(DROP, OPTIONS):
        to = tokens + row * (OPTIONS - DROP) + (option - DROP)
        tl.store(to, count_held(held, span, option))
    tl.debug_barrier()
    total = tl.zeros([TILE], tl.float64)
    for first in tl.range(0, span, TILE):
        token = first + tl.arange(0, TILE)
        exists = token < span
        at = tl.load(held + token, mask=exists, other=0)
        total += load_losses(start, stride, at.to(tl.int64), token, exists).to(tl.float64)
        if DROP:
            tl.store(held + token, at - 1, mask=exists)
    tl.store(objective + row, tl.sum(total, axis=0))
