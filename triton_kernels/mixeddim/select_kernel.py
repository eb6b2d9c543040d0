"""Order statistics of a row of gains, digit by digit from the highest.

A number's digits are four bits of an integer that compares as the number does. A pass counts the
next digit of all that start with the digits found so far: sixteen counters of four bits in one word
per position of a tile, emptied before they overflow.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .allocate_kernels import TILE

COUNTED = tl.constexpr(1024)
"""Tokens of a tile that is counted."""

EXACT, NEARLY = tl.constexpr(8), tl.constexpr(5)
"""Digits of a number, and of one to within one part in 2,048."""
BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
FULL = tl.constexpr(15)
"""Tiles after which a counter is full. As many tokens fit the 16 bits in which words are summed."""

EVERY_FOURTH = tl.constexpr(0x000F000F000F000F)
SIGN = tl.constexpr(-(2**31))
LOWEST = tl.constexpr(-(2**31))
LEAST, GREATEST = tl.constexpr(0x007FFFFF - 2**31), tl.constexpr(0x7F800000)
"""The infinities, by :func:`ordered`."""


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
def count_digits(row, span, shift, found):
    """How often each digit comes next, int32 ``[DIGITS]``.

    Args:
        row: pointer to float32 ``[span]``.
        shift: bits below the digit.
        found: the digits above it, as a number; others are not counted.
    """
    digit = tl.arange(0, DIGITS)
    counts = tl.zeros([DIGITS], tl.int32)
    for begin in tl.range(0, span, FULL * COUNTED):
        held = tl.zeros([COUNTED], tl.int64)
        for first in tl.range(begin, tl.minimum(begin + FULL * COUNTED, span), COUNTED):
            token = first + tl.arange(0, COUNTED)
            exists = token < span
            bits = ordered(tl.load(row + token, mask=exists, other=0)) ^ SIGN
            moved = bits.to(tl.uint32, bitcast=True) >> shift
            one = tl.full([COUNTED], 1, tl.int64) << ((moved & (DIGITS - 1)) * BITS).to(tl.int64)
            held += tl.where(exists & (moved >> BITS == found), one, 0)
        for word in tl.static_range(BITS):
            fields = tl.sum((held >> (BITS * word)) & EVERY_FOURTH, axis=0)
            mine = (fields >> (digit // 4 * 16).to(tl.int64)) & 0xFFFF
            counts += tl.where(digit % 4 == word, mine, 0).to(tl.int32)
    return counts


@triton.jit
def kth_largest(row, span, rank, PASSES: tl.constexpr = EXACT):
    """The ``rank``-th largest of a row of gains, by :func:`ordered`; 1 is the largest.

    Args:
        row: pointer to float32 ``[span]``.
        rank: from 1 to ``span``.
        PASSES: digits that are found; for those that are not, 8 stands, about the middle.
    """
    digit = tl.arange(0, DIGITS)
    found = tl.zeros([1], tl.uint32)
    left = tl.zeros([1], tl.int32) + rank.to(tl.int32)
    for step in tl.range(0, PASSES):
        counts = count_digits(row, span, (EXACT - 1 - step) * BITS, found)
        reached = tl.cumsum(counts, axis=0, reverse=True) >= left
        next_digit = tl.sum(reached.to(tl.int32), axis=0) - 1
        left -= tl.sum(tl.where(digit > next_digit, counts, 0), axis=0)
        found = found * DIGITS + next_digit.to(tl.uint32)
    for _ in tl.static_range(EXACT - PASSES):
        found = found * DIGITS + DIGITS // 2
    bits = tl.max(found.to(tl.int32, bitcast=True), axis=0) ^ SIGN
    return tl.minimum(tl.maximum(bits, LEAST), GREATEST)  # infinities stay what they are
