"""Scores of the window's queries over a prompt's tokens, as they are and as a format holds them.

Columns of a tile are the queries of a KV head, window and group together; rows are tokens, since a
token's codes then go from registers that made them into the next product.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .elements import bfloat16_bits, float_of_bfloat16
from .paged import load_rows, matrix_of, product, rotated_rows
from .quantize import errors_in_steps, quantize_rows, scale_bits

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def page_of(first_layer, row, SHAPE: tl.constexpr):
    """The page of a layer and head in every block."""
    return (first_layer * SHAPE.heads + row).to(tl.int64)


@triton.jit
def load_queries(
    queries, width, first, count, start, DIMS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Dimensions ``start ..`` of queries ``first ..``: ``[CHUNK, TILE]``, zero outside."""
    query = first + tl.arange(0, TILE)
    dim = start + tl.arange(0, CHUNK)
    mask = (dim < DIMS)[:, None] & (query < count)[None, :]
    return tl.load(queries + query[None, :] * width + dim[:, None], mask=mask, other=0)


@triton.jit
def exact_scores(
    queries, first, count, cache, offsets, exists, SHAPE: tl.constexpr, TILE: tl.constexpr
):
    """Scores of queries ``first ..`` over keys as they are: float32 ``[tokens, TILE]``."""
    scores = tl.zeros([offsets.shape[0], TILE], tl.float32)
    PADDED: tl.constexpr = SHAPE.padded_dims
    CHUNK: tl.constexpr = SHAPE.score_chunk
    for start in tl.static_range(0, PADDED, CHUNK):
        keys = load_rows(cache, offsets, exists, start, SHAPE.dims, CHUNK)
        query = load_queries(queries, SHAPE.dims, first, count, start, SHAPE.dims, CHUNK, TILE)
        scores = product(keys, query, scores, SHAPE.score_type)
    return scores


@triton.jit
def held_keys(
    cache, offsets, exists, hadamard, basis, head, NUMBER: tl.constexpr, SHAPE: tl.constexpr
):
    """Keys as a format would hold them.

    Args:
        hadamard: see :func:`.paged.matrix_of`; ``basis`` as well, of keys.
        head: of a layer.
        NUMBER: which of ``SHAPE.candidates``.

    Returns:
        Codes (as float16 where that is exact and enough) or elements, ``[tokens, rank]``; and
        what they are to be multiplied by, ``[tokens]``.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    SPACE: tl.constexpr = FORMAT.space
    dim = tl.arange(0, FORMAT.padded_rank)
    wanted = dim < FORMAT.rank
    matrix = matrix_of(hadamard, basis, head, SPACE)
    keys = rotated_rows(cache, offsets, exists, matrix, dim, wanted, SPACE)
    if FORMAT.quantized:
        codes, bits = quantize_rows(
            keys, wanted[None, :], SPACE.norm, FORMAT.rank, FORMAT.bits, FORMAT.step
        )
        held = tl.where(wanted[None, :], codes - FORMAT.zero, 0.0)
        factor = float_of_bfloat16(bits)
        if FORMAT.splits_queries:
            held = held.to(tl.float16)
    else:
        held = keys * SPACE.norm
        factor = tl.full([offsets.shape[0]], 1.0, tl.float32)
    return held, factor


@triton.jit
def whole_rotated(cache, offsets, exists, hadamard, SHAPE: tl.constexpr):
    """Vectors in the Hadamard space, over its norm; nothing where no candidate is in it."""
    if SHAPE.uses_hadamard:
        dim = tl.arange(0, SHAPE.padded_dims)
        wanted = dim < SHAPE.dims
        SPACE: tl.constexpr = SHAPE.hadamard
        rows = rotated_rows(cache, offsets, exists, hadamard, dim, wanted, SPACE)
    else:
        rows = exists
    return rows


@triton.jit
def code_errors(rows, NUMBER: tl.constexpr, SHAPE: tl.constexpr):
    """What a format's codes take from vectors.

    Args:
        rows: see :func:`whole_rotated`.
        NUMBER: which of ``SHAPE.candidates``.

    Returns:
        Errors in steps, float32 ``[tokens, padded_dims]``, zero outside; and steps, ``[tokens]``.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    NORM: tl.constexpr = SHAPE.hadamard.norm
    wanted = (tl.arange(0, SHAPE.padded_dims) < SHAPE.dims)[None, :]
    bits = scale_bits(rows, wanted, NORM, SHAPE.dims, FORMAT.bits, FORMAT.step)
    errors = errors_in_steps(rows, bits, NORM, SHAPE.hadamard.has_ties, FORMAT.bits)
    if SHAPE.dims < SHAPE.padded_dims:
        errors = tl.where(wanted, errors, 0.0)
    return errors, float_of_bfloat16(bits)


@triton.jit
def key_operand(
    rows, cache, offsets, exists, hadamard, basis, head, NUMBER: tl.constexpr, SHAPE: tl.constexpr
):
    """What queries are multiplied by for a candidate, and the products' factor: scales of codes.

    Errors need few bits: as float16, with queries as one float16, what they take from a score is
    right to 11 bits. Keys of a basis share no score with keys as they are; see :func:`held_keys`.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    if SHAPE.by_errors[NUMBER]:
        operand, factor = code_errors(rows, NUMBER, SHAPE)
        if FORMAT.splits_queries:
            operand = operand.to(tl.float16)
    else:
        operand, factor = held_keys(cache, offsets, exists, hadamard, basis, head, NUMBER, SHAPE)
    return operand, factor


@triton.jit
def held_scores(
    held, factor, rotated, halves, first, count, NUMBER: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr, OF_ERRORS: tl.constexpr,
):  # fmt: skip
    """Scores of queries ``first ..`` over :func:`held_keys`: float32 ``[tokens, TILE]``.

    Args:
        rotated: pointer to the head's queries in the formats' spaces, float32.
        halves: the same as two float16 each, the second what the first leaves, all first ones
            before.
        OF_ERRORS: over keys' errors instead, for which a query's first half is enough.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    WIDTH: tl.constexpr = SHAPE.rotated_width
    RANK: tl.constexpr = FORMAT.rank
    PADDED: tl.constexpr = FORMAT.padded_rank
    scores = tl.zeros([held.shape[0], TILE], tl.float32)
    if FORMAT.splits_queries:
        halves += FORMAT.first_query
        if not OF_ERRORS:
            low = load_queries(halves + count * WIDTH, WIDTH, first, count, 0, RANK, PADDED, TILE)
            scores = product(held, low, scores, tl.float16)
        high = load_queries(halves, WIDTH, first, count, 0, RANK, PADDED, TILE)
        scores = product(held, high, scores, tl.float16)
    else:
        rotated += FORMAT.first_query
        query = load_queries(rotated, WIDTH, first, count, 0, RANK, PADDED, TILE)
        scores = product(held, query, scores, tl.float32)
    return scores * factor[:, None]


@triton.jit
def keep_scales(
    code_scales, plane, token, exists, scale, NUMBER: tl.constexpr, SIDE: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Write the scales of some tokens' codes for packing; of elements there are none.

    Args:
        code_scales: see :func:`token_sums`, from the head's first one on.
        plane: scales of all heads.
        scale: float32 ``[tokens]``, each exactly a bfloat16.
        NUMBER: which of ``SHAPE.candidates``.
        SIDE: 0 for keys, 1 for values.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    if FORMAT.quantized:
        to = code_scales + (2 * NUMBER + SIDE) * plane + token
        tl.store(to, bfloat16_bits(scale), mask=exists)
