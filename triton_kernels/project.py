"""Vectors times a matrix per head: the Hadamard rotation and principal bases, before compression.

torch multiplies float32 outside the matrix units. Here float32 operands are split into three
products of them (tf32x3), which keeps some 21 bits of their 24, and vectors are read in the cache's
type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .shapes import padded
from .window_kernels import load_chunk

CHUNK = 16
"""Dimensions taken at a time: more would not fit the registers of a float32 product."""

TILE_ELEMENTS = 1 << 14
"""Products that a program keeps: 64 registers of each of its threads."""

MAX_TILE_ROWS = 128

NUM_WARPS = 8


def tile_rows(columns: int) -> int:
    """Vectors of a tile, for that many columns (a power of two)."""
    return min(TILE_ELEMENTS // columns, MAX_TILE_ROWS)


@triton.jit(do_not_specialize=["tokens"])
def project_rows(
    vectors,
    vector_head_stride,
    vector_stride,
    encoder,
    encoder_head_stride,
    encoder_row_stride,
    encoder_column_stride,
    tokens,
    projected,
    DIMS: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply a tile of vectors. Grid: token tiles, heads.

    Args:
        vectors: ``[heads, tokens, DIMS]``, innermost contiguous; strides in elements.
        encoder: float32 ``[heads, DIMS, RANK]``.
        projected: written, float32 ``[heads, tokens, RANK]``.
    """
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    vectors += head * vector_head_stride
    encoder += head * encoder_head_stride
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, DIMS, CHUNK):
        left = load_chunk(vectors, vector_stride, first, tokens, start, DIMS, CHUNK, ROWS)
        row = start + tl.arange(0, CHUNK)
        mask = (row < DIMS)[:, None] & (column < RANK)[None, :]
        at = row[:, None] * encoder_row_stride + column[None, :] * encoder_column_stride
        right = tl.load(encoder + at, mask=mask, other=0.0)
        total = tl.dot(left.to(tl.float32), right, total, input_precision="tf32x3")
    token = first + tl.arange(0, ROWS)
    to = projected + (head * tokens + token)[:, None] * RANK + column[None, :]
    tl.store(to, total, mask=(token < tokens)[:, None] & (column < RANK)[None, :])


def project(vectors: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
    """See :meth:`mdkv_vllm.core.kernels.CompressionKernels.rotate`; vectors of any float type."""
    heads, tokens, dims = vectors.shape
    rank = encoder.shape[2]
    columns = padded(rank)
    rows = tile_rows(columns)
    projected = torch.empty(heads, tokens, rank, dtype=torch.float32, device=vectors.device)
    project_rows[(triton.cdiv(tokens, rows), heads)](
        vectors,
        *vectors.stride()[:2],
        encoder,
        *encoder.stride(),
        tokens,
        projected,
        DIMS=dims,
        RANK=rank,
        CHUNK=CHUNK,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=NUM_WARPS,
    )
    return projected
