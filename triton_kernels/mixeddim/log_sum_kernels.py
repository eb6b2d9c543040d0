"""Log-sum-exps of the window's queries over a whole prompt, in shares that are then merged.

Every program works for one layer and head, told by its last index; a group of layers is one grid.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .fast_math import exp2_flushed
from .paged import key_offsets
from .softmax import LOWEST
from .window_scores import exact_scores, held_keys, held_scores, page_of


@triton.jit(do_not_specialize=["each"])
def split_queries(rotated, each, halves, TILE: tl.constexpr):
    """Queries as two float16 each, the second what the first leaves. Grid: tiles, heads.

    Args:
        rotated: float32 ``[heads, each]``.
        each: numbers of a head.
        halves: written, float16 ``[heads, 2, each]``.
    """
    number = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1).to(tl.int64)
    exists = number < each
    x = tl.load(rotated + head * each + number, mask=exists, other=0.0)
    high = x.to(tl.float16)
    to = halves + 2 * head * each + number
    tl.store(to, high, mask=exists)
    tl.store(to + each, (x - high.to(tl.float32)).to(tl.float16), mask=exists)


@triton.jit(do_not_specialize=["first_layer", "first_token", "last_token", "count", "first_query"])
def query_log_sums(
    cache, blocks, queries, rotated, halves, hadamard, basis, first_layer, first_token, last_token,
    count, first_query, scale, log_sums, SHAPE: tl.constexpr, CANDIDATE: tl.constexpr,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of queries' scores over a share of tokens. Grid: shares, query tiles, heads.

    Args:
        queries: ``[heads, count, dims]`` as they are.
        rotated: float32 ``[heads, count, rotated_width]``, in the formats' spaces.
        halves: float16 ``[heads, 2, count, rotated_width]``; see :func:`held_scores`.
        hadamard: see :func:`.paged.matrix_of`; ``basis`` as well, of keys.
        first_token: where the first share starts.
        last_token: where the last share ends.
        first_query: position of the first query; a query sees no key behind its own position.
        scale: factor of the scores, times log2(e).
        log_sums: written, float32 ``[heads, shares, count]``, base 2; minus infinity where a query
            sees nothing.
        CANDIDATE: as which of ``SHAPE.candidates`` keys are held; -1 for as they are.
        CAUSAL: whether some tokens lie behind a query.
    """
    share = tl.program_id(0)
    first = tl.program_id(1) * TILE
    head = tl.program_id(2)
    page = page_of(first_layer, head, SHAPE)
    query = first + tl.arange(0, TILE)
    position = first_query + query // SHAPE.group
    maximum = tl.full([TILE], LOWEST, tl.float32)
    weights = tl.zeros([TOKENS, TILE], tl.float32)
    begin = first_token + share * SHARE
    end = tl.minimum(begin + SHARE, last_token)
    start_of = head.to(tl.int64) * count
    for start in tl.range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        exists = token < end
        offsets = key_offsets(blocks, page, token, exists, SHAPE)
        if CANDIDATE < 0:
            scores = scale * exact_scores(
                queries + start_of * SHAPE.dims, first, count, cache, offsets, exists, SHAPE, TILE
            )
        else:
            held, factor = held_keys(
                cache, offsets, exists, hadamard, basis, head, CANDIDATE, SHAPE
            )
            at = start_of * SHAPE.rotated_width
            # The product of factors first, as :func:`token_sums` has it: so scores are the same.
            scores = held_scores(
                held, factor * scale, rotated + at, halves + 2 * at, first, count, CANDIDATE, SHAPE,
                TILE, False,
            )  # fmt: skip
        scores += tl.where(exists, 0.0, float("-inf"))[:, None]
        if CAUSAL:
            scores = tl.where(token[:, None] <= position[None, :], scores, float("-inf"))
        raised = tl.maximum(maximum, tl.max(scores, axis=0))
        weights *= exp2_flushed(maximum - raised)[None, :]
        weights += exp2_flushed(scores - raised[None, :])
        maximum = raised
    total = maximum + tl.log2(tl.sum(weights, axis=0))
    to = log_sums + (head.to(tl.int64) * tl.num_programs(0) + share) * count + query
    tl.store(to, total, mask=query < count)


@triton.jit(do_not_specialize=["count", "shares", "rest_shares"])
def merge_log_sums(parts, rest_parts, count, shares, rest_shares, log_sums, TILE: tl.constexpr):
    """Log-sum-exp over all shares of the span and of what lies behind. Grid: query tiles, heads.

    Args:
        parts: float32 ``[heads, shares, count]``, base 2; ``rest_parts`` likewise.
        log_sums: written, float32 ``[heads, count]``, base 2.
    """
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1).to(tl.int64)
    mask = query < count
    maximum = tl.full([TILE], LOWEST, tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    for share in tl.range(0, shares):
        part = tl.load(parts + (head * shares + share) * count + query, mask=mask, other=0.0)
        raised = tl.maximum(maximum, part)
        weight = weight * tl.exp2(maximum - raised) + tl.exp2(part - raised)
        maximum = raised
    for share in tl.range(0, rest_shares):
        at = rest_parts + (head * rest_shares + share) * count + query
        part = tl.load(at, mask=mask, other=0.0)
        raised = tl.maximum(maximum, part)
        weight = weight * tl.exp2(maximum - raised) + tl.exp2(part - raised)
        maximum = raised
    tl.store(log_sums + head * count + query, maximum + tl.log2(weight), mask=mask)
