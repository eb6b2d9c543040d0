"""Vectors to integer codes with one scale each, and back; :mod:`mdkv_vllm.core.quantise`.

Divisions and roots are rounded as IEEE 754 has it, not approximated as GPUs do by default: so codes
are the reference's, but where sums in another order move a vector's scale.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .elements import bfloat16_bits, float_of_bfloat16
from .softmax import INTERPRETED

TILE_ELEMENTS = 4096
"""Elements of a tile of vectors, about: what four warps hold in registers several times."""

MAX_TILE_VECTORS = 128

SMALLEST_STEP = tl.constexpr(1e-30)

ROUND_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a small float32 leaves no bit for a fraction; ties go to even."""


def tile_vectors(padded_rank: int) -> int:
    """Vectors of a tile: a power of two."""
    return min(max(TILE_ELEMENTS // padded_rank, 16), MAX_TILE_VECTORS)


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
def mid_rise(x, step, BITS: tl.constexpr):
    """Nearest of the levels ``.. -0.5, 0.5 ..`` in units of a step per row."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    level = tl.floor(divide_rows(x, tl.maximum(step, SMALLEST_STEP)))
    return tl.minimum(tl.maximum(level, -HALF), HALF - 1) + 0.5


@triton.jit
def quantise_rows(x, exists, RANK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """Quantise each row of a tile.

    Args:
        x: float32 ``[rows, columns]``, zero where a column does not exist.
        exists: bool ``[1, columns]``.
        RANK: columns that exist.
        STEP: :func:`.prompt_shape.gaussian_step`.

    Returns:
        float32 codes less the code for zero, ``[rows, columns]``, anything where a column does
        not exist; and the scales' bfloat16 bits, uint16 ``[rows]``.
    """
    if BITS == 8:
        # Nudged up so that rounding to bfloat16 never clips the largest element.
        bits = bfloat16_bits(tl.max(tl.abs(x), axis=1) * (1.00390625 / 127))
        step = tl.maximum(float_of_bfloat16(bits), SMALLEST_STEP)
        nearest = (divide_rows(x, step) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
        codes = tl.minimum(tl.maximum(nearest, -127.0), 127.0)
    else:
        mean = tl.div_rn(tl.sum(x * x, axis=1), tl.full([x.shape[0]], RANK, tl.float32))
        level = tl.where(exists, mid_rise(x, tl.sqrt_rn(mean) * STEP, BITS), 0.0)
        # Least squares: the scale that fits the codes best.
        fitted = tl.div_rn(tl.sum(x * level, axis=1), tl.sum(level * level, axis=1))
        bits = bfloat16_bits(fitted)
        codes = mid_rise(x, float_of_bfloat16(bits), BITS)
    return codes, bits
