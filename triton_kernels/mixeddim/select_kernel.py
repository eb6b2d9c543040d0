"""Order statistics of a row of gains, digit by digit from the highest.

Gains are kept as integers that compare as they do, in rows of whole tiles: no test of a bound and
no conversion is in the way of a pass. It counts the next digit (four bits) of all that start with
the digits found so far: sixteen counters of four bits in two words per position of a tile, emptied
before they overflow, first into bytes of the same thread.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .fast_math import one_shifted

TILE = tl.constexpr(1024)
"""Tokens at a time; rows of gains are as many of them as hold a row."""

EXACT, NEARLY = tl.constexpr(8), tl.constexpr(5)
"""Digits of a number, and of one to within one part in 2,048."""
BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
FULL = tl.constexpr(15)
"""Tiles after which a counter is full."""
BYTES_FULL = tl.constexpr(4 * 15)
"""Tiles after which bytes are full that counters are emptied into, four positions in one. Their
tokens fit the 16 bits in which bytes are summed."""

LOWEST = tl.constexpr(-(2**31))
"""Of no token: below all numbers."""
LEAST, GREATEST = tl.constexpr(0x007FFFFF - 2**31), tl.constexpr(0x7F800000)
"""The infinities, by :func:`ordered`."""


def whole_tiles(span: int) -> int:
    """Elements of a row of gains of so many tokens."""
    return triton.cdiv(span, TILE.value) * TILE.value


@triton.jit
def ordered(x):
    """int32 that compare as float32 do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of_ordered(bits):
    """Inverse of :func:`ordered`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def store_gains(row, token, gain, span):
    """Store a tile of a row of gains, by :func:`ordered`, and ``LOWEST`` behind its end.

    Args:
        row: pointer to int32, of whole tiles.
        token: ``[TILE]``.
    """
    tl.store(row + token, tl.where(token < span, ordered(gain), LOWEST))


@triton.jit
def count(low, high, place):
    """Add one to the sixteen counters of words ``low`` and ``high``, by ``place``, int32.

    Places of others than 0 to 15 are not counted.
    """
    shift = place * BITS
    return low + one_shifted(shift), high + one_shifted(shift - 32)


@triton.jit
def bytes_of(low, high):
    """A tile's counters as bytes, of four positions in one: int32 ``[TILE // 4, 2, 2]``."""
    even_low, odd_low = low & 0x0F0F0F0F, (low >> 4) & 0x0F0F0F0F
    even_high, odd_high = high & 0x0F0F0F0F, (high >> 4) & 0x0F0F0F0F
    words = tl.join(tl.join(even_low, odd_low), tl.join(even_high, odd_high))
    return tl.sum(tl.reshape(words, [low.shape[0] // 4, 4, 2, 2]), axis=1)


@triton.jit
def totals(words):
    """Sums of :func:`bytes_of` over positions, int32 ``[DIGITS]``."""
    halves = tl.join(words & 0x00FF00FF, (words >> 8) & 0x00FF00FF)
    # Dimensions: half, odd, and which of two bytes; the words' halves are the last.
    sums = tl.sum(halves, axis=0)[:, :, :, None]
    last = tl.arange(0, 2)[None, None, None, :] * 16
    each = (sums >> last) & 0xFFFF
    return tl.reshape(tl.permute(each, (1, 3, 2, 0)), [DIGITS])


@triton.jit
def count_digits(row, length, shift, found):
    """How often each digit comes next, int32 ``[DIGITS]``.

    Args:
        row: pointer to int32 ``[length]``, see :func:`store_gains`.
        shift: bits below the digit.
        found: the digits above it, as a number; others are not counted.
    """
    counts = tl.zeros([DIGITS], tl.int32)
    # Digits are of numbers from 0 up: half the range more, which a shift takes along.
    start = (found << BITS) - (tl.full([1], 1, tl.int32) << (31 - shift))
    for begin in tl.range(0, length, BYTES_FULL * TILE):
        words = tl.zeros([TILE // 4, 2, 2], tl.int32)
        end = tl.minimum(begin + BYTES_FULL * TILE, length)
        for part in tl.range(begin, end, FULL * TILE):
            low = tl.zeros([TILE], tl.int32)
            high = tl.zeros([TILE], tl.int32)
            for first in tl.range(part, tl.minimum(part + FULL * TILE, end), TILE):
                bits = tl.load(row + first + tl.arange(0, TILE))
                low, high = count(low, high, (bits >> shift) - start)
            words += bytes_of(low, high)
        counts += totals(words)
    return counts


@triton.jit
def kth_largest(row, length, rank, PASSES: tl.constexpr = EXACT):
    """The ``rank``-th largest of a row of gains, by :func:`ordered`; 1 is the largest.

    Args:
        row: pointer to int32 ``[length]``, see :func:`store_gains`.
        rank: from 1 to the number of tokens.
        PASSES: digits that are found; for those that are not, 8 stands, about the middle.
    """
    digit = tl.arange(0, DIGITS)
    found = tl.zeros([1], tl.int32)
    left = tl.zeros([1], tl.int32) + rank.to(tl.int32)
    for step in tl.range(0, PASSES):
        counts = count_digits(row, length, (EXACT - 1 - step) * BITS, found)
        reached = tl.cumsum(counts, axis=0, reverse=True) >= left
        next_digit = tl.sum(reached.to(tl.int32), axis=0) - 1
        left -= tl.sum(tl.where(digit > next_digit, counts, 0), axis=0)
        found = found * DIGITS + next_digit
    for _ in tl.static_range(EXACT - PASSES):
        found = found * DIGITS + DIGITS // 2
    bits = tl.max(found, axis=0) ^ LOWEST
    return tl.minimum(tl.maximum(bits, LEAST), GREATEST)  # infinities stay what they are
