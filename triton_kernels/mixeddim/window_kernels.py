"""Passes over a prompt's tokens that say what the window queries make of each.

Columns of a tile are the queries of a KV head, window and group together; rows are tokens, since a
token's codes then go from registers that made them into the next product. Every program works for
one layer and head, told by its last index; a group of layers is one grid.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .elements import bfloat16_bits, float_of_bfloat16
from .fast_math import exp2_flushed, reciprocal
from .paged import key_offsets, load_rows, matrix_of, product, rotated_rows
from .quantize import errors_in_steps, quantize_rows, row_products, scale_bits
from .softmax import LOWEST

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def page_of(first_layer, row, SHAPE: tl.constexpr):
    """The page of a layer and head in every block."""
    return (first_layer * SHAPE.heads + row).to(tl.int64)


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


@triton.jit
def value_lost(
    rows, cache, offsets, exists, square, basis, head, NUMBER: tl.constexpr, SHAPE: tl.constexpr
):
    """Squared errors of values as a format would hold them, and its codes' scales: ``[tokens]``.

    Args:
        rows: see :func:`whole_rotated`.
        square: squared norms of the values, ``[tokens]``.
        basis: see :func:`.paged.matrix_of`, of values.
        head: of a layer.
        NUMBER: which of ``SHAPE.candidates``.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    SPACE: tl.constexpr = FORMAT.space
    if FORMAT.in_hadamard:
        off, step = code_errors(rows, NUMBER, SHAPE)
        lost = row_products(off, off) * step * step
    else:
        dim = tl.arange(0, FORMAT.padded_rank)
        wanted = dim < FORMAT.rank
        matrix = matrix_of(basis, basis, head, SPACE)
        kept = rotated_rows(cache, offsets, exists, matrix, dim, wanted, SPACE)
        # Orthonormal columns: what the projection loses is what it does not hold.
        lost = tl.maximum(square - tl.sum(kept * kept, axis=1), 0.0)
        step = tl.full([offsets.shape[0]], 1.0, tl.float32)
        if FORMAT.quantized:
            codes, bits = quantize_rows(
                kept, wanted[None, :], SPACE.norm, FORMAT.rank, FORMAT.bits, FORMAT.step
            )
            step = float_of_bfloat16(bits)
            off = kept - (codes - FORMAT.zero) * step[:, None]
            off = tl.where(wanted[None, :], off, 0.0)
            lost += tl.sum(off * off, axis=1)
    return lost, step


@triton.jit(do_not_specialize=["first_layer", "span"])
def value_errors(
    cache, blocks, hadamard, basis, first_layer, span, norms, errors, code_scales,
    SHAPE: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Norms of values, and of what each format loses of them. Grid: shares, heads.

    Args:
        hadamard: see :func:`matrix_of`; ``basis`` as well, of values.
        norms: written, float32 ``[heads, span]``.
        errors: written, float32 ``[candidates, heads, span]``.
        code_scales: see :func:`token_sums`; those of values are written.
    """
    CANDIDATES: tl.constexpr = SHAPE.num_candidates
    share = tl.program_id(0)
    head = tl.program_id(1)
    page = page_of(first_layer, head, SHAPE)
    plane = tl.num_programs(1).to(tl.int64) * span
    norms += head.to(tl.int64) * span
    errors += head.to(tl.int64) * span
    code_scales += head.to(tl.int64) * span
    cache += SHAPE.dims
    for first in tl.range(share * SHARE, tl.minimum((share + 1) * SHARE, span), TOKENS):
        token = first + tl.arange(0, TOKENS)
        exists = token < span
        offsets = key_offsets(blocks, page, token, exists, SHAPE)
        rows = whole_rotated(cache, offsets, exists, hadamard, SHAPE)
        if SHAPE.uses_hadamard:
            square = row_products(rows, rows) * (SHAPE.hadamard.norm * SHAPE.hadamard.norm)
        else:
            values = load_rows(cache, offsets, exists, 0, SHAPE.dims, SHAPE.padded_dims)
            values = values.to(tl.float32)
            square = tl.sum(values * values, axis=1)
        tl.store(norms + token, tl.sqrt(square), mask=exists)
        for candidate in tl.static_range(CANDIDATES):
            lost, step = value_lost(
                rows, cache, offsets, exists, square, basis, head, candidate, SHAPE
            )
            tl.store(errors + candidate * plane + token, tl.sqrt(lost), mask=exists)
            keep_scales(code_scales, plane, token, exists, step, candidate, 1, SHAPE)
