"""Vectors of a prompt in the paged cache, as they are and in the formats' spaces."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import INTERPRETED


@triton.jit
def product(left, right, total, TYPE: tl.constexpr):
    """``left @ right + total`` with operands of a type; float32 ones as three products of TF32."""
    left = left.to(TYPE)
    right = right.to(TYPE)
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def key_offsets(blocks, page, token, exists, SHAPE: tl.constexpr):
    """Where tokens' keys start in the cache, in elements: int64; values lie ``dims`` further.

    Args:
        blocks: pointer to the prompt's int32 blocks.
        page: of the layer and head, in every block.
        token: ``[tokens]``.
        exists: which of them to look up.
    """
    block = tl.load(blocks + token // SHAPE.block_size, mask=exists, other=0).to(tl.int64)
    slot = (block * SHAPE.pages_per_block + page) * SHAPE.block_size + token % SHAPE.block_size
    return slot * (2 * SHAPE.dims)


@triton.jit
def load_rows(cache, offsets, exists, start, DIMS: tl.constexpr, CHUNK: tl.constexpr):
    """Dimensions ``start ..`` of vectors of the cache: ``[vectors, CHUNK]``, zero outside."""
    dim = start + tl.arange(0, CHUNK)
    mask = exists[:, None] & (dim < DIMS)[None, :]
    return tl.load(cache + offsets[:, None] + dim[None, :], mask=mask, other=0)


@triton.jit
def load_matrix(matrix, start, column, wanted, SPACE: tl.constexpr):
    """Rows ``start ..`` of a space's matrix: ``[SPACE.chunk, columns]``, zero outside."""
    row = start + tl.arange(0, SPACE.chunk)
    mask = (row < SPACE.dims)[:, None] & wanted[None, :]
    return tl.load(matrix + row[:, None] * SPACE.stride + column[None, :], mask=mask, other=0)


@triton.jit
def rotated_rows(cache, offsets, exists, matrix, column, wanted, SPACE: tl.constexpr):
    """Vectors of the cache in a space, over ``SPACE.norm``: float32 ``[vectors, columns]``.

    Whoever multiplies the result anyway multiplies by the norm as well. It is zero outside.

    Args:
        cache: the cache, as elements.
        offsets: where the vectors start.
        exists: which of them to read.
        matrix: pointer to the layer's and head's matrix, rows of ``SPACE.rank``.
        column: dimensions of the space to make, ``[columns]``, in any order.
        wanted: which of them exist.
    """
    total = tl.zeros([offsets.shape[0], column.shape[0]], tl.float32)
    PADDED: tl.constexpr = SPACE.padded_dims
    CHUNK: tl.constexpr = SPACE.chunk
    if CHUNK == PADDED:
        left = load_rows(cache, offsets, exists, 0, SPACE.dims, CHUNK)
        right = load_matrix(matrix, 0, column, wanted, SPACE)
        total = product(left, right, total, SPACE.operand)
    else:
        for start in tl.range(0, PADDED, CHUNK, num_stages=2):
            left = load_rows(cache, offsets, exists, start, SPACE.dims, CHUNK)
            right = load_matrix(matrix, start, column, wanted, SPACE)
            total = product(left, right, total, SPACE.operand)
    return total


@triton.jit
def matrix_of(hadamard, basis, row, SPACE: tl.constexpr):
    """The matrix of a layer and head.

    Args:
        hadamard: pointer to the Hadamard matrix without its norm, in the cache's type.
        basis: pointer to float32 ``[rows, dims, basis rank]``.
        row: of a layer and head.
    """
    if SPACE.in_basis:  # noqa: SIM108 (Triton's types of the two differ)
        matrix = basis + row.to(tl.int64) * (SPACE.dims * SPACE.stride)
    else:
        matrix = hadamard
    return matrix
