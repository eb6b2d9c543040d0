"""What the window's queries give each token, and how far every format moves that.

Every program works for one layer and head, told by its last index; a group of layers is one grid.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .fast_math import exp2_flushed, reciprocal
from .paged import key_offsets
from .window_scores import (
    exact_scores,
    held_scores,
    keep_scales,
    key_operand,
    page_of,
    whole_rotated,
)


@triton.jit
def moved_by(
    operand, factor, rotated, halves, first, count, away, log_sum, probability, rest, totals,
    NUMBER: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How far a format moves what queries ``first ..`` give tokens, summed over them: ``[tokens]``.

    Args:
        operand: see :func:`key_operand`.
        factor: what makes products with it base-2 logarithms.
        rotated: as for :func:`held_scores`, and what follows to ``count``.
        away: log-sum-exps less the scores of keys as they are, base 2, ``[tokens, TILE]``.
        log_sum: the log-sum-exps, ``[1, TILE]``.
        probability: what queries give tokens as they are; ``rest`` what they give others.
        totals: log-sum-exps with the span as the format holds it, for ``SHAPE.together``.
    """
    OF_ERRORS: tl.constexpr = SHAPE.by_errors[NUMBER]
    scores = held_scores(
        operand, factor, rotated, halves, first, count, NUMBER, SHAPE, TILE, OF_ERRORS
    )
    if SHAPE.together:
        query = first + tl.arange(0, TILE)
        total = tl.load(totals + query, mask=query < count, other=float("inf"))[None, :]
        changed = exp2_flushed(scores - total)
    elif OF_ERRORS:
        changed = reciprocal(tl.fma(rest, exp2_flushed(away + scores), 1.0))
    else:
        changed = reciprocal(tl.fma(rest, exp2_flushed(log_sum - scores), 1.0))
    return tl.sum(tl.abs(changed - probability), axis=1)


@triton.jit(do_not_specialize=["first_layer", "span", "count"])
def token_sums(
    cache, blocks, queries, rotated, halves, hadamard, basis, first_layer, span, count, scale,
    log_sums, sums, masses, code_scales, SHAPE: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Sums over queries for a share of tokens, of every candidate. Grid: shares, heads.

    Two candidates share a pass over the queries: more would not fit registers.

    Args:
        queries: as for :func:`query_log_sums`, and what follows to ``scale``.
        log_sums: float32 ``[1 + candidates, heads, count]``, base 2, over all keys: as they are,
            and where ``SHAPE.together`` with those of the span as each format would hold them.
        sums: written, float32 ``[1 + candidates, heads, span]``: ``sum_q P``, then
            ``sum_q |P_f - P|``.
        masses: written, float32 ``[heads, shares]``: sums of ``sum_q P``.
        code_scales: written, bfloat16 bits, uint16 ``[candidates, 2, heads, span]``: the scales of
            keys' codes, where a candidate has any; ``[:, 1]`` is for those of values.
    """
    CANDIDATES: tl.constexpr = SHAPE.num_candidates
    PASSES: tl.constexpr = max(1, (CANDIDATES + 1) // 2)
    share = tl.program_id(0)
    head = tl.program_id(1)
    page = page_of(first_layer, head, SHAPE)
    start_of = head.to(tl.int64) * count
    plane = tl.num_programs(1).to(tl.int64)
    queries += start_of * SHAPE.dims
    rotated += start_of * SHAPE.rotated_width
    halves += 2 * start_of * SHAPE.rotated_width
    log_sums += start_of
    sums += head.to(tl.int64) * span
    code_scales += head.to(tl.int64) * span
    mass_sum = tl.zeros([TOKENS], tl.float32)
    for start in tl.range(share * SHARE, tl.minimum((share + 1) * SHARE, span), TOKENS):
        token = start + tl.arange(0, TOKENS)
        exists = token < span
        offsets = key_offsets(blocks, page, token, exists, SHAPE)
        rows = whole_rotated(cache, offsets, exists, hadamard, SHAPE)
        for number in tl.static_range(PASSES):
            if 2 * number < CANDIDATES:
                first_operand, first_factor = key_operand(
                    rows, cache, offsets, exists, hadamard, basis, head, 2 * number, SHAPE
                )
                keep_scales(
                    code_scales, plane * span, token, exists, first_factor, 2 * number, 0, SHAPE
                )
                first_factor *= scale
            if 2 * number + 1 < CANDIDATES:
                second_operand, second_factor = key_operand(
                    rows, cache, offsets, exists, hadamard, basis, head, 2 * number + 1, SHAPE
                )
                keep_scales(
                    code_scales, plane * span, token, exists, second_factor, 2 * number + 1, 0,
                    SHAPE,
                )  # fmt: skip
                second_factor *= scale
            mass = tl.zeros([TOKENS], tl.float32)
            first_moved = tl.zeros([TOKENS], tl.float32)
            second_moved = tl.zeros([TOKENS], tl.float32)
            for first in tl.range(0, count, TILE):
                query = first + tl.arange(0, TILE)
                # Queries that do not exist have the probability of an infinite sum: none.
                log_sum = tl.load(log_sums + query, mask=query < count, other=float("inf"))
                log_sum = log_sum[None, :]
                scores = exact_scores(queries, first, count, cache, offsets, exists, SHAPE, TILE)
                away = log_sum - scores * scale
                probability = exp2_flushed(-away)
                mass += tl.sum(probability, axis=1)
                # The bound only guards against nothing times infinity.
                rest = tl.maximum(1 - probability, 1e-30)
                if 2 * number < CANDIDATES:
                    first_moved += moved_by(
                        first_operand, first_factor, rotated, halves, first, count, away, log_sum,
                        probability, rest, log_sums + (2 * number + 1) * plane * count, 2 * number,
                        SHAPE, TILE,
                    )  # fmt: skip
                if 2 * number + 1 < CANDIDATES:
                    second_moved += moved_by(
                        second_operand, second_factor, rotated, halves, first, count, away, log_sum,
                        probability, rest, log_sums + (2 * number + 2) * plane * count,
                        2 * number + 1, SHAPE, TILE,
                    )  # fmt: skip
            if number == 0:
                mass_sum += tl.where(exists, mass, 0.0)
                tl.store(sums + token, mass, mask=exists)
            to = sums + (2 * number + 1) * plane * span + token
            if 2 * number < CANDIDATES:
                tl.store(to, first_moved, mask=exists)
            if 2 * number + 1 < CANDIDATES:
                tl.store(to + plane * span, second_moved, mask=exists)
    at = head.to(tl.int64) * tl.num_programs(0) + share
    tl.store(masses + at, tl.sum(mass_sum, axis=0))
