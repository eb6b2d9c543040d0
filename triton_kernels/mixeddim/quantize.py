"""Vectors to integer codes with one scale each, and back; :mod:`mdkv_vllm.core.quantize`.

A quotient is a product with the scale's reciprocal, and a code is that product rounded by adding a
number so large that no bit is left for a fraction: two or three instructions an element, where
exact division, rounding and bounds take eleven. Four bits' codes are the reference's but for
quotients within some 1e-6 of a threshold, unless sums in another order move a vector's scale. Eight
bits', which round half to even, take two more instructions to be exact where codes are kept.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .elements import bfloat16_bits, float_of_bfloat16
from .fast_math import multiply_add_clamped
from .softmax import INTERPRETED

TILE_ELEMENTS = 8192
"""Elements of a tile of vectors, about: what four warps hold in registers twice."""

MAX_TILE_VECTORS = 128

SMALLEST_STEP = tl.constexpr(1e-30)

ROUND_SIGNED = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a small float32 leaves no bit for a fraction; ties go to even."""

ROUND = tl.constexpr(8388608.0)
"""2**23, the same for what is not negative."""

HALF = tl.constexpr(0.5 + 2**-24)
"""The next float32 above a half, so that a quotient on a threshold goes up, as the reference's."""


def tile_vectors(padded_rank: int) -> int:
    """Vectors of a tile: a power of two."""
    return min(max(TILE_ELEMENTS // padded_rank, 16), MAX_TILE_VECTORS)


@triton.jit
def mid_rise(x, per_step, BITS: tl.constexpr):
    """Number of the nearest of the levels ``.. -0.5, 0.5 ..`` in units of a step per row.

    Args:
        x: float32 ``[rows, columns]``.
        per_step: reciprocals of the steps, ``[rows]``.

    Returns:
        float32, 0 for the lowest level.
    """
    TOP: tl.constexpr = 2.0**BITS - 1
    share = multiply_add_clamped(x, (per_step * (1 / TOP))[:, None], HALF)
    return tl.fma(share, TOP, ROUND) - ROUND


@triton.jit
def halves(x):
    """The first and the second half of a tile's columns."""
    pairs = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def add_products(x, y, total):
    """``total`` and the products of four parts of a tile's columns."""
    left, right = halves(x)
    other_left, other_right = halves(y)
    x0, x1 = halves(left)
    x2, x3 = halves(right)
    y0, y1 = halves(other_left)
    y2, y3 = halves(other_right)
    return tl.fma(x3, y3, tl.fma(x2, y2, tl.fma(x1, y1, tl.fma(x0, y0, total))))


@triton.jit
def row_products(x, y):
    """Sums of ``x * y`` over each row of a tile.

    Columns are cut into eight parts, which lie in the same threads, as the matrix units give them:
    so most products are added as they are made, where a sum over all has a tree of additions.
    """
    COLUMNS: tl.constexpr = x.shape[1]
    if (COLUMNS == 64) | (COLUMNS == 128):
        left, right = halves(x)
        other_left, other_right = halves(y)
        total = tl.zeros([x.shape[0], COLUMNS // 8], tl.float32)
        total = add_products(left, other_left, total)
        return tl.sum(add_products(right, other_right, total), axis=1)
    else:
        return tl.sum(x * y, axis=1)


@triton.jit
def scale_bits(
    x, exists, NORM: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr
):
    """The scale of each row of a tile of vectors.

    Args:
        x: float32 ``[rows, columns]``, to be multiplied by ``NORM``; zero where a column does not
            exist.
        exists: bool ``[1, columns]``.
        RANK: columns that exist.
        STEP: :func:`.prompt_shape.gaussian_step`.

    Returns:
        bfloat16 bits, uint16 ``[rows]``.
    """
    if BITS == 8:
        # Nudged up so that rounding to bfloat16 never clips the largest element.
        return bfloat16_bits(tl.max(tl.abs(x), axis=1) * NORM * (1.00390625 / 127))
    else:
        mean = row_products(x, x) * (NORM * NORM / RANK)
        first = tl.maximum(tl.sqrt_rn(mean) * STEP, SMALLEST_STEP)
        level = mid_rise(x, NORM / first, BITS) - (2**BITS - 1) / 2
        if RANK < x.shape[1]:
            level = tl.where(exists, level, 0.0)
        # Least squares: the scale that fits the codes best.
        fitted = row_products(x, level) * NORM
        return bfloat16_bits(tl.div_rn(fitted, row_products(level, level)))


@triton.jit
def divide_rows(x, y):
    """``x / y`` rounded to nearest, of ``[rows, columns]`` and a positive ``[rows]``.

    A quotient by the rounded reciprocal is off by its last bit at most, which its remainder
    corrects (Markstein 1990): three instructions an element, where a division has some ten.
    """
    y = y[:, None]
    if INTERPRETED:
        quotient = x / y  # the interpreter rounds the parts of a fused multiply-add
    else:
        reciprocal = tl.div_rn(tl.full(y.shape, 1.0, tl.float32), y)
        first = x * reciprocal
        quotient = tl.fma(tl.fma(-first, y, x), reciprocal, first)
    return quotient


@triton.jit
def codes_of(x, bits, NORM: tl.constexpr, BITS: tl.constexpr):
    """Codes of each row of a tile at its scale: float32, anything where a column does not exist.

    Args:
        x: see :func:`scale_bits`.
        bits: bfloat16 bits of the scales that it found, uint16 ``[rows]``.
    """
    step = tl.maximum(float_of_bfloat16(bits), SMALLEST_STEP)
    if BITS == 8:
        # The scale is large enough for every element.
        return (divide_rows(x, step * (1 / NORM)) + ROUND_SIGNED) - (ROUND_SIGNED - 128)
    else:
        return mid_rise(x, NORM / step, BITS)


@triton.jit
def quantize_rows(
    x, exists, NORM: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr
):
    """Quantize each row of a tile; arguments as for :func:`scale_bits`.

    Returns:
        Codes as float32 ``[rows, columns]``, anything where a column does not exist; and the
        scales' bfloat16 bits, uint16 ``[rows]``.
    """
    bits = scale_bits(x, exists, NORM, RANK, BITS, STEP)
    return codes_of(x, bits, NORM, BITS), bits


@triton.jit
def byte_of(x):
    """uint8 of whole float32 numbers from 0 to 255: the last bits of a sum with ``ROUND``."""
    return (x + ROUND).to(tl.uint32, bitcast=True).to(tl.uint8)


@triton.jit
def errors_in_steps(x, bits, NORM: tl.constexpr, TIES: tl.constexpr, BITS: tl.constexpr):
    """Elements less what their codes stand for, in units of their row's scale, ``bits``.

    Args:
        x: see :func:`scale_bits`.
        TIES: whether quotients just between two codes have to go to the even one, as packing's.
    """
    step = tl.maximum(float_of_bfloat16(bits), SMALLEST_STEP)
    per_step = NORM / step
    if (BITS == 8) & TIES:
        place = divide_rows(x, step * (1 / NORM))
        return place - ((place + ROUND_SIGNED) - ROUND_SIGNED)
    elif BITS == 8:
        nearest = tl.fma(x, per_step[:, None], ROUND_SIGNED) - ROUND_SIGNED
        return tl.fma(x, per_step[:, None], -nearest)
    else:
        place = tl.fma(x, per_step[:, None], (2**BITS - 1) / 2)
        return place - mid_rise(x, per_step, BITS)
