"""Attention over the pages of one list, for each of the three ways in which tokens lie in them.

All three take pages ``first .. last`` of a list, which lie in one lease, and take the state of one
online softmax further: the rows' maximum ``[rows]``, weights ``[rows, columns]``, and weighted
values ``[rows, ...]``, where rows are the query heads of the group, padded for the matrix units.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import lease_page
from .codes import load_byte_rows, unpack, unpack_field
from .softmax import LOWEST, absorb, dot, raise_maximum

LEAST_EXPONENT = tl.constexpr(-40)


@triton.jit
def empty_state(PART: tl.constexpr, SHAPE: tl.constexpr):
    """The state before the first page of a list."""
    LIST: tl.constexpr = SHAPE.parts[PART]
    HEADS: tl.constexpr = SHAPE.padded_group
    COLUMNS: tl.constexpr = LIST.columns
    VALUES: tl.constexpr = LIST.padded_value_row * LIST.fields
    maximum = tl.full([HEADS], LOWEST, tl.float32)
    weights = tl.zeros([HEADS, COLUMNS], tl.float32)
    values = tl.zeros([HEADS, VALUES], tl.float32)
    return maximum, weights, values


@triton.jit
def value_exponent(bits):
    """The part of a scale of V that joins the score, from the bfloat16's bits as int32.

    Bounded, for a token weighs as much as others though its value be next to nothing, and its
    weight would vanish among theirs.
    """
    return tl.maximum((bits >> 7) - 127, LEAST_EXPONENT)


@triton.jit
def attend_codes(
    query,
    cache,
    blocks,
    first_block,
    first_page,
    first,
    last,
    num_tokens,
    scale,
    maximum,
    weights,
    values,
    PART: tl.constexpr,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention over pages of integer codes.

    No code is multiplied by its scale. The scale of K multiplies the score, where the zero
    point leaves as well. That of V, ``2 ** e * f`` with ``1 <= f < 2``, is split: ``e`` joins
    the score, which keeps the weights within float16 whatever the scales; ``f`` the weight.
    See :func:`value_exponent` for vectors of nothing.

    Args:
        query: ``[rows, padded_rank]`` of the list's ``dot_type``, in the format's space.
        first_block: where the lease starts in ``blocks``.
        first_page: page of the lease at which the list starts, or would.
        first: first page of the list to read.
        last: one past the last.
        num_tokens: tokens in the list up to those of the lease, see ``addresses.py``.
        scale: factor of the scores, which are base-2 logarithms.
        maximum: the state so far.
        weights: same.
        values: same.
        PART: index of the list in ``SHAPE.parts``.

    Returns:
        The state; column ``f * padded_value_row + j`` of the values is field ``f`` of byte ``j``.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    HEADS: tl.constexpr = SHAPE.padded_group
    FIELDS: tl.constexpr = LIST.fields
    BYTES: tl.constexpr = LIST.columns
    VALUE_BYTES: tl.constexpr = LIST.padded_value_row
    BITS: tl.constexpr = LIST.bits
    TYPE: tl.constexpr = LIST.dot_type

    column = tl.arange(0, BYTES)
    value_byte = tl.arange(0, VALUE_BYTES)[None, :]
    zero_score = tl.sum(query.to(tl.float32), axis=1)[:, None] * LIST.bias
    for tile in tl.range(first * LIST.chunks, last * LIST.chunks, num_stages=STAGES):
        number = tile // LIST.chunks
        start = tile % LIST.chunks * BYTES
        page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        scales = (page + LIST.scales_offset).to(tl.pointer_type(tl.uint16))
        packed_keys = load_byte_rows(page, start, PART, SHAPE)
        # Every field of K's bytes is a run of tokens. All are loaded before any is used.
        in_list, packed_values, key_scales, value_scales = (), (), (), ()
        for field in tl.static_range(FIELDS):
            in_page = field * LIST.key_row + start + column
            exists = (start + column < LIST.key_row) & (
                number * LIST.tokens_per_page + in_page < num_tokens
            )
            rows = page + LIST.section_bytes + in_page[:, None] * LIST.value_row
            mask = exists[:, None] & (value_byte < LIST.value_row)
            in_list += (exists,)
            packed_values += (tl.load(rows + value_byte, mask=mask, other=0),)
            key_scales += (tl.load(scales + in_page, mask=exists, other=0),)
            value_at = LIST.tokens_per_page + in_page
            value_scales += (tl.load(scales + value_at, mask=exists, other=0).to(tl.int32),)

        scores = ()
        highest = tl.full([HEADS, BYTES], float("-inf"), tl.float32)
        for field in tl.static_range(FIELDS):
            keys = unpack_field(packed_keys, BITS, field, TYPE)
            # A bfloat16 is the upper half of a float32.
            key_scale = (key_scales[field].to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            exponent = value_exponent(value_scales[field]).to(tl.float32)
            score = (dot(query, keys, None) - zero_score) * (key_scale * scale)[None, :]
            score = tl.where(in_list[field][None, :], score + exponent[None, :], float("-inf"))
            scores += (score,)
            highest = tl.maximum(highest, score)
        raised, factor = raise_maximum(maximum, highest)
        weights *= factor
        values *= factor
        for field in tl.static_range(FIELDS):
            value_scale = value_scales[field]
            weight = tl.exp2(scores[field] - raised[:, None])
            unscaled = (127 - value_exponent(value_scale)) << 23
            unscaled = unscaled.to(tl.float32, bitcast=True)
            weights += weight * unscaled[None, :]
            fraction = (value_scale << 16).to(tl.float32, bitcast=True) * unscaled
            codes = unpack(packed_values[field], BYTES, VALUE_BYTES, BITS, TYPE)
            centred = codes - tl.full([], LIST.bias, TYPE)
            values = dot((weight * fraction[None, :]).to(TYPE), centred, values)
        maximum = raised
    return maximum, weights, values


@triton.jit
def attend_elements(
    query,
    cache,
    blocks,
    first_block,
    first_page,
    first,
    last,
    num_tokens,
    scale,
    maximum,
    weights,
    values,
    PART: tl.constexpr,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention over pages of a lower rank in the cache's type; see :func:`attend_codes`."""
    LIST: tl.constexpr = SHAPE.parts[PART]
    CAPACITY: tl.constexpr = LIST.tokens_per_page
    COLUMNS: tl.constexpr = LIST.columns
    RANK: tl.constexpr = LIST.padded_rank
    column = tl.arange(0, COLUMNS)
    dim = tl.arange(0, RANK)
    for tile in tl.range(first * LIST.chunks, last * LIST.chunks, num_stages=STAGES):
        number = tile // LIST.chunks
        in_page = tile % LIST.chunks * COLUMNS + column
        page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        page = page.to(tl.pointer_type(LIST.element))
        exists = (in_page < CAPACITY) & (number * CAPACITY + in_page < num_tokens)
        keys = tl.load(
            page + dim[:, None] * CAPACITY + in_page[None, :],
            mask=(dim < LIST.rank)[:, None] & (in_page < CAPACITY)[None, :],
            other=0,
        )
        rows = tl.load(
            page + LIST.rank * CAPACITY + in_page[:, None] * LIST.rank + dim[None, :],
            mask=exists[:, None] & (dim < LIST.rank)[None, :],
            other=0,
        )
        scores = dot(query, keys, None) * scale
        maximum, weights, values = absorb(maximum, weights, values, scores, exists, rows)
    return maximum, weights, values


@triton.jit
def attend_slots(
    query,
    cache,
    blocks,
    first_block,
    first_page,
    first,
    last,
    num_tokens,
    scale,
    maximum,
    weights,
    values,
    PART: tl.constexpr,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention over full tokens; see :func:`attend_codes`. A tile takes tokens of several pages.

    Args:
        first_block: where the lease, or the tail, starts in ``blocks``.
        first_page: the list's first page in the lease; or the tail's page in each of its blocks.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    BLOCK_SIZE: tl.constexpr = SHAPE.block_size
    TOKENS: tl.constexpr = LIST.columns
    RANK: tl.constexpr = LIST.padded_rank
    dim = tl.arange(0, RANK)
    end = tl.minimum(num_tokens, last * BLOCK_SIZE)
    for start in tl.range(first * BLOCK_SIZE, end, TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        exists = token < end
        number = tl.minimum(token, end - 1) // BLOCK_SIZE
        if PART < SHAPE.num_lists:  # a list, whose pages follow one another
            page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        else:
            block = tl.load(blocks + first_block + number).to(tl.int64)
            page = cache + (block * SHAPE.pages_per_block + first_page) * SHAPE.page_bytes
        slots = page.to(tl.pointer_type(LIST.element)) + token % BLOCK_SIZE * (2 * LIST.rank)
        mask = exists[:, None] & (dim < LIST.rank)[None, :]
        keys = tl.load(slots[:, None] + dim[None, :], mask=mask, other=0)
        rows = tl.load(slots[:, None] + LIST.rank + dim[None, :], mask=mask, other=0)
        scores = dot(query, tl.trans(keys), None) * scale
        maximum, weights, values = absorb(maximum, weights, values, scores, exists, rows)
    return maximum, weights, values
