"""The two passes of :mod:`mdkv_vllm.triton_kernels.window_scores`, and their tile of scores.

Rows of a tile are the queries of a KV head, window and group together; columns are tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import INTERPRETED, LOWEST, raise_maximum

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_chunk(
    rows, stride, first, count, start, DIMS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Dimensions ``start ..`` of rows ``first ..``: ``[TILE, CHUNK]``, zero outside.

    Args:
        rows: pointer to the first row, of contiguous dimensions; the others lie ``stride``
            elements apart.
        count: rows there are.
        DIMS: dimensions of a row.
    """
    row = first + tl.arange(0, TILE)
    dim = start + tl.arange(0, CHUNK)
    mask = (row < count)[:, None] & (dim < DIMS)[None, :]
    return tl.load(rows + row.to(tl.int64)[:, None] * stride + dim[None, :], mask=mask, other=0)


@triton.jit
def score_tile(
    queries,
    query_stride,
    first_row,
    num_rows,
    keys,
    key_stride,
    first_token,
    last_token,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Scores of a tile of queries over a tile of keys: float32 ``[ROWS, TOKENS]``, 0 outside.

    Dimensions are taken in turns, so that tiles of any head size fit the registers. float32
    operands are split into three products of the matrix units (tf32x3), which keeps some 21 bits
    of their 24.

    Args:
        queries: pointer to a head's queries; see :func:`load_chunk`.
        keys: pointer to a head's keys.
        DIMS: dimensions of both.
        CHUNK: dimensions at a time.
        TYPE: type of the products' operands.
    """
    scores = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in tl.range(0, DIMS, CHUNK):
        left = load_chunk(queries, query_stride, first_row, num_rows, start, DIMS, CHUNK, ROWS)
        right = load_chunk(keys, key_stride, first_token, last_token, start, DIMS, CHUNK, TOKENS)
        left = left.to(TYPE)
        right = right.to(TYPE)
        if INTERPRETED:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        scores = tl.dot(left, tl.trans(right), scores, input_precision="tf32x3")
    return scores


@triton.jit(do_not_specialize=["first_token", "last_token", "num_rows", "first_query"])
def row_log_sums(
    queries,
    query_head_stride,
    query_stride,
    keys,
    key_head_stride,
    key_stride,
    first_token,
    last_token,
    num_rows,
    first_query,
    scale,
    log_sums,
    GROUP: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Log-sum-exp of each query's scores over a share of tokens. Grid: shares, row tiles, heads.

    Args:
        queries: ``[heads, num_rows, DIMS]``, strides of the first two in elements.
        keys: ``[heads, last_token or more, DIMS]``, likewise.
        first_token: where the first share starts.
        last_token: where the last share ends.
        first_query: position of the first query; a query sees no key behind its own position.
        scale: factor of the scores, times log2(e).
        log_sums: written, float32 ``[heads, shares, num_rows]``, natural logarithm; minus infinity
            where a query sees nothing.
        GROUP: rows of one position.
        TYPE: type of the products' operands.
    """
    share = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    head = tl.program_id(2).to(tl.int64)
    row = first_row + tl.arange(0, ROWS)
    position = first_query + row // GROUP
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    weights = tl.zeros([ROWS, TOKENS], tl.float32)
    begin = first_token + share * SHARE
    end = tl.minimum(begin + SHARE, last_token)
    for start in range(begin, end, TOKENS):
        scores = score_tile(
            queries + head * query_head_stride,
            query_stride,
            first_row,
            num_rows,
            keys + head * key_head_stride,
            key_stride,
            start,
            end,
            DIMS,
            CHUNK,
            TYPE,
            ROWS,
            TOKENS,
        )
        token = start + tl.arange(0, TOKENS)
        seen = (token < end)[None, :] & (token[None, :] <= position[:, None])
        scores = tl.where(seen, scores * scale, float("-inf"))
        maximum, factor = raise_maximum(maximum, scores)
        weights = weights * factor + tl.exp2(scores - maximum[:, None])
    total = (maximum + tl.log2(tl.sum(weights, axis=1))) / LOG2_E
    to = log_sums + (head * tl.num_programs(0) + share) * num_rows + row
    tl.store(to, total, mask=row < num_rows)


@triton.jit(do_not_specialize=["span", "num_rows"])
def token_sums(
    queries,
    query_head_stride,
    query_stride,
    keys,
    key_head_stride,
    key_stride,
    log_sums,
    other_queries,
    other_query_head_stride,
    other_query_stride,
    other_keys,
    other_key_head_stride,
    other_key_stride,
    other_log_sums,
    span,
    num_rows,
    scale,
    mass,
    moved,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
    OTHER_DIMS: tl.constexpr,
    OTHER_CHUNK: tl.constexpr,
    OTHER_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Sums over queries for a tile of tokens, of one candidate. Grid: token tiles, heads.

    Args:
        queries: ``[heads, num_rows, DIMS]``, strides of the first two in elements.
        keys: ``[heads, span, DIMS]``, likewise.
        log_sums: float32 ``[heads, num_rows]``, natural, over all keys.
        other_queries: the candidate's, ``[heads, num_rows, OTHER_DIMS]``.
        other_keys: the candidate's, ``[heads, span, OTHER_DIMS]``; OTHER_DIMS 0 for no candidate.
        other_log_sums: float32 ``[heads, num_rows]``, when all tokens take the candidate's scores;
            read if ``TOGETHER``.
        scale: factor of the scores, times log2(e).
        mass: written, float32 ``[heads, span]``, ``sum_q P``. Every candidate writes the same.
        moved: written, float32 ``[heads, span]``, ``sum_q |P_f - P|``.
        TOGETHER: whether all tokens take the candidate's scores (``paper``), or each alone.
    """
    first = tl.program_id(0) * TOKENS
    head = tl.program_id(1).to(tl.int64)
    masses = tl.zeros([TOKENS], tl.float32)
    moves = tl.zeros([TOKENS], tl.float32)
    for first_row in range(0, num_rows, ROWS):
        row = first_row + tl.arange(0, ROWS)
        # Rows that do not exist have the probability of an infinite sum: none.
        at = head * num_rows + row
        log_sum = tl.load(log_sums + at, mask=row < num_rows, other=float("inf"))[:, None] * LOG2_E
        scores = score_tile(
            queries + head * query_head_stride,
            query_stride,
            first_row,
            num_rows,
            keys + head * key_head_stride,
            key_stride,
            first,
            span,
            DIMS,
            CHUNK,
            TYPE,
            ROWS,
            TOKENS,
        )
        probability = tl.exp2(scores * scale - log_sum)
        masses += tl.sum(probability, axis=0)
        if OTHER_DIMS > 0:
            scores = score_tile(
                other_queries + head * other_query_head_stride,
                other_query_stride,
                first_row,
                num_rows,
                other_keys + head * other_key_head_stride,
                other_key_stride,
                first,
                span,
                OTHER_DIMS,
                OTHER_CHUNK,
                OTHER_TYPE,
                ROWS,
                TOKENS,
            )
            exponent = scores * scale
            if TOGETHER:
                total = tl.load(other_log_sums + at, mask=row < num_rows, other=float("inf"))
                changed = tl.exp2(exponent - total[:, None] * LOG2_E)
            else:
                # The bounds only guard against overflow, and against nothing over nothing.
                raised = tl.exp2(tl.minimum(exponent - log_sum, 60 * LOG2_E))
                changed = raised / (raised + tl.maximum(1 - probability, 1e-30))
            moves += tl.sum(tl.abs(changed - probability), axis=0)
    token = first + tl.arange(0, TOKENS)
    to = head * span + token
    tl.store(mass + to, masses, mask=token < span)
    if OTHER_DIMS > 0:
        tl.store(moved + to, moves, mask=token < span)
