"""Vectors to integer codes with one scale each, and back; :mod:`mdkv_vllm.core.quantise`.

Divisions and roots are rounded as IEEE 754 has it, not approximated as GPUs do by default: so
codes are the reference's, but where sums in another order move a vector's scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mdkv_vllm.core.quantise import _GAUSSIAN_STEP

from .elements import bfloat16_bits, float_of_bfloat16
from .shapes import padded

TILE_ELEMENTS = 4096
"""Elements of a tile of vectors, about: what four warps hold in registers several times."""

MAX_TILE_VECTORS = 128

SMALLEST_STEP = tl.constexpr(1e-30)

ROUND_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a small float32 leaves no bit for a fraction; ties go to even."""


def gaussian_step(bits: int) -> float:
    """First step of the quantiser for vectors of unit variance; 0 where none is used."""
    return _GAUSSIAN_STEP.get(bits, 0.0)


def tile_vectors(padded_rank: int) -> int:
    """Vectors of a tile: a power of two."""
    return min(max(TILE_ELEMENTS // padded_rank, 16), MAX_TILE_VECTORS)


@triton.jit
def divide(x, y):
    """``x / y`` rounded to nearest, of float32 that are broadcast to each other's shape."""
    x, y = tl.broadcast(x, y)
    return tl.div_rn(x, y)


@triton.jit
def mid_rise(x, step, BITS: tl.constexpr):
    """Nearest of the levels ``.. -0.5, 0.5 ..`` in units of a step per row."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    level = tl.floor(divide(x, tl.maximum(step, SMALLEST_STEP)[:, None]))
    return tl.minimum(tl.maximum(level, -HALF), HALF - 1) + 0.5


@triton.jit
def quantise_rows(x, exists, RANK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """Quantise each row of a tile.

    Args:
        x: float32 ``[rows, columns]``, zero where a column does not exist.
        exists: bool ``[1, columns]``.
        RANK: columns that exist.
        STEP: :func:`gaussian_step`.

    Returns:
        float32 codes less the code for zero, ``[rows, columns]``, anything where a column does
        not exist; and the scales' bfloat16 bits, uint16 ``[rows]``.
    """
    if BITS == 8:
        # Nudged up so that rounding to bfloat16 never clips the largest element.
        bits = bfloat16_bits(tl.max(tl.abs(x), axis=1) * (1.00390625 / 127))
        step = tl.maximum(float_of_bfloat16(bits), SMALLEST_STEP)
        nearest = (divide(x, step[:, None]) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
        codes = tl.minimum(tl.maximum(nearest, -127.0), 127.0)
    else:
        mean = divide(tl.sum(x * x, axis=1), tl.full([x.shape[0]], RANK, tl.float32))
        level = tl.where(exists, mid_rise(x, tl.sqrt_rn(mean) * STEP, BITS), 0.0)
        # Least squares: the scale that fits the codes best.
        fitted = divide(tl.sum(x * level, axis=1), tl.sum(level * level, axis=1))
        bits = bfloat16_bits(fitted)
        codes = mid_rise(x, float_of_bfloat16(bits), BITS)
    return codes, bits


@triton.jit
def load_vectors(rows, stride, index, exists, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Some rows of a matrix with contiguous dimensions, as float32 ``[rows, PADDED]``.

    Args:
        rows: pointer to row 0; the others lie ``stride`` elements apart.
        index: which, ``[rows]``.
        exists: bool ``[rows]``; others are zero, as is what lies beyond ``RANK``.
    """
    dim = tl.arange(0, PADDED)
    mask = exists[:, None] & (dim < RANK)[None, :]
    at = rows + index.to(tl.int64)[:, None] * stride + dim[None, :]
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["span"])
def read_back(
    keys,
    key_head_stride,
    key_stride,
    values,
    value_head_stride,
    value_stride,
    span,
    read,
    error,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Quantise and read back a tile of tokens. Grid: token tiles, heads.

    Args:
        keys: ``[heads, span, RANK]``, strides of the first two in elements; ``values`` likewise.
        read: written, float32 ``[heads, span, RANK]``, keys as read back.
        error: written, float32 ``[heads, span]``, squared error of values as read back.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED)[None, :]
    exists = token < span
    x = load_vectors(keys + head * key_head_stride, key_stride, token, exists, RANK, PADDED)
    codes, bits = quantise_rows(x, dim < RANK, RANK, BITS, STEP)
    to = read + (head * span + token)[:, None] * RANK + dim
    mask = exists[:, None] & (dim < RANK)
    tl.store(to, codes * float_of_bfloat16(bits)[:, None], mask=mask)
    x = load_vectors(values + head * value_head_stride, value_stride, token, exists, RANK, PADDED)
    codes, bits = quantise_rows(x, dim < RANK, RANK, BITS, STEP)
    lost = tl.where(mask, x - codes * float_of_bfloat16(bits)[:, None], 0.0)
    tl.store(error + head * span + token, tl.sum(lost * lost, axis=1), mask=exists)


def round_trip(
    keys: torch.Tensor, values: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`mdkv_vllm.core.kernels.CompressionKernels.round_trip`; any float type.

    Args:
        keys: ``[kv_heads, span, rank]``, innermost contiguous.
        values: same shape.
        bits: 8, 4 or 2.
    """
    heads, span, rank = keys.shape
    read = torch.empty(heads, span, rank, dtype=torch.float32, device=keys.device)
    error = torch.empty(heads, span, dtype=torch.float32, device=keys.device)
    tokens = tile_vectors(padded(rank))
    read_back[(triton.cdiv(span, tokens), heads)](
        keys,
        *keys.stride()[:2],
        values,
        *values.stride()[:2],
        span,
        read,
        error,
        RANK=rank,
        PADDED=padded(rank),
        BITS=bits,
        STEP=gaussian_step(bits),
        TOKENS=tokens,
    )
    return read, error
