"""The split kernel: every program attends over its share of one unit's pages.

A unit is a query and a KV head. Its pages are counted through its lists, in the page table's
order and of each list lease by lease, and then through its tail; since all pages have equal bytes,
equal shares of pages are equal shares of bytes. What a program makes of one list is a *part* of
the result:

    pages    | i4 i4 i4 i4 i4 | i8 i8 | full | tail tail tail |
    programs | 0        | 1        | 2          | 3           |
    parts    | 0:i4     | 1:i4 1:i8| 2:i8 ..    | 3:tail      |

From one part to the next either the program or the list is another one, and neither ever goes
back: so program plus list is a different number for every part, and numbers its slot in the
workspace.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import (
    FIRST_LIST,
    ROW,
    TAIL_BLOCK,
    TAIL_TOKENS,
    extents_of,
    find_extents,
    load_extent,
    record_of,
)
from .pages import attend_codes, attend_elements, attend_slots, empty_state


@triton.jit
def load_query(plain, head_stride, rotated, PART: tl.constexpr, SHAPE: tl.constexpr):
    """A group's queries in the space of a part: ``[padded_group, padded_rank]``, zero outside.

    Args:
        plain: pointer to the group's first query, rows ``head_stride`` apart.
        rotated: pointer to float32 ``[group, rotated_width]``.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    head = tl.arange(0, SHAPE.padded_group)[:, None]
    dim = tl.arange(0, LIST.padded_rank)[None, :]
    mask = (head < SHAPE.group) & (dim < LIST.rank)
    if LIST.in_slots:
        loaded = tl.load(plain + head * head_stride + dim, mask=mask, other=0)
    else:
        first: tl.constexpr = SHAPE.basis_rank if LIST.in_hadamard else 0
        loaded = tl.load(rotated + head * SHAPE.rotated_width + first + dim, mask=mask, other=0)
    return loaded.to(LIST.dot_type)


@triton.jit
def store_part(out, lse, maximum, weights, values, PART: tl.constexpr, SHAPE: tl.constexpr):
    """Write one part, normalised: a state after the last page.

    Args:
        out: pointer to float32 ``[group, head_size]``.
        lse: pointer to the part's base-2 logarithm; those of the heads lie ``num_parts`` apart.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    PER_BYTE: tl.constexpr = LIST.fields
    head = tl.arange(0, SHAPE.padded_group)
    column = tl.arange(0, LIST.padded_value_row * PER_BYTE)
    in_row = column % LIST.padded_value_row
    dim = column // LIST.padded_value_row * LIST.value_row + in_row
    mask = (head < SHAPE.group)[:, None] & (in_row < LIST.value_row)[None, :]
    weights = tl.sum(weights, axis=1)
    tl.store(
        out + head[:, None] * SHAPE.head_size + dim[None, :], values / weights[:, None], mask=mask
    )
    tl.store(lse + head * SHAPE.num_parts, maximum + tl.log2(weights), mask=head < SHAPE.group)


@triton.jit
def store_no_part(lse, SHAPE: tl.constexpr):
    """Say that there is no part; see :func:`store_part`."""
    head = tl.arange(0, SHAPE.padded_group)
    nothing = tl.full([SHAPE.padded_group], float("-inf"), tl.float32)
    tl.store(lse + head * SHAPE.num_parts, nothing, mask=head < SHAPE.group)


@triton.jit
def attend_pages(
    query, cache, blocks, first_block, first_page, first, last, num_tokens, scale,
    maximum, weights, values,
    PART: tl.constexpr, SHAPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend over pages of a list in one lease, whatever its format; see :func:`attend_codes`."""
    if SHAPE.parts[PART].in_slots:
        maximum, weights, values = attend_slots(
            query, cache, blocks, first_block, first_page, first, last, num_tokens, scale,
            maximum, weights, values, PART, SHAPE, STAGES,
        )  # fmt: skip
    elif SHAPE.parts[PART].quantized:
        maximum, weights, values = attend_codes(
            query, cache, blocks, first_block, first_page, first, last, num_tokens, scale,
            maximum, weights, values, PART, SHAPE, STAGES,
        )  # fmt: skip
    else:
        maximum, weights, values = attend_elements(
            query, cache, blocks, first_block, first_page, first, last, num_tokens, scale,
            maximum, weights, values, PART, SHAPE, STAGES,
        )  # fmt: skip
    return maximum, weights, values


@triton.jit
def attend_list(
    query, cache, blocks, extents, first, last, scale,
    PART: tl.constexpr, SHAPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend over pages ``first .. last - 1`` of a list, lease by lease.

    Args:
        extents: pointer to the list's extents.
    """
    maximum, weights, values = empty_state(PART, SHAPE)
    if SHAPE.max_leases == 1:
        _, until, origin, first_block = load_extent(extents, 0, SHAPE)
        maximum, weights, values = attend_pages(
            query, cache, blocks, first_block, origin, first, last, until, scale,
            maximum, weights, values, PART, SHAPE, STAGES,
        )  # fmt: skip
    else:
        begin, stop = find_extents(extents, first, last, SHAPE)
        for lease in tl.range(begin, stop, num_stages=1):
            end, until, origin, first_block = load_extent(extents, lease, SHAPE)
            end = tl.minimum(end, last)
            maximum, weights, values = attend_pages(
                query, cache, blocks, first_block, origin, first, end, until, scale,
                maximum, weights, values, PART, SHAPE, STAGES,
            )  # fmt: skip
            first = end
    return maximum, weights, values


@triton.jit(do_not_specialize=["layer", "table_stride", "min_pages"])
def attend_split(
    query,
    query_stride,
    head_stride,
    rotated,
    cache,
    block_table,
    table_stride,
    records,
    extents,
    layer,
    scale,
    min_pages,
    part_out,
    part_lse,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend over one share of one unit. Grid: splits, KV heads, queries.

    Args:
        query: ``[queries, q_heads, head_size]``, strides of the first two in elements.
        rotated: float32 ``[queries, q_heads, rotated_width]``, from ``prepare_units``.
        cache: uint8 of the whole cache, 16-byte aligned.
        block_table: int32 ``[rows, blocks]``, stride of the first in elements.
        records: from ``prepare_units``.
        extents: same.
        layer: layer of the model.
        scale: factor of the scores, times log2(e).
        min_pages: pages that a program takes at least; later programs then have none.
        part_out: written, float32 ``[queries, kv_heads, splits + lists, group, head_size]``,
            where there is a part.
        part_lse: written, float32 ``[queries, kv_heads, splits, group, lists + 1]``, base-2
            logarithm; minus infinity where there is no part.
    """
    LISTS: tl.constexpr = SHAPE.num_lists
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    head = tl.program_id(1)
    index = tl.program_id(2).to(tl.int64)
    unit = index * tl.num_programs(1) + head
    record = record_of(records, unit, SHAPE)
    blocks = block_table + tl.load(record + ROW).to(tl.int64) * table_stride
    tail_block = tl.load(record + TAIL_BLOCK)
    tail_tokens = tl.load(record + TAIL_TOKENS)
    tail_pages = tl.cdiv(tail_tokens, SHAPE.block_size)
    total = tail_pages
    for f in tl.static_range(LISTS):
        total += tl.load(record + FIRST_LIST + f)
    share = tl.maximum(tl.cdiv(total, splits), min_pages)
    begin = split * share
    end = begin + share

    out = part_out + (unit * (splits + LISTS) + split) * SHAPE.part_floats
    lse = part_lse + (unit * splits + split) * (SHAPE.group * SHAPE.num_parts)
    plain = query + index * query_stride + head * SHAPE.group * head_stride
    turned = rotated + unit * (SHAPE.group * SHAPE.rotated_width)
    before = 0  # pages of the lists so far
    for f in tl.static_range(LISTS):
        pages = tl.load(record + FIRST_LIST + f)
        first = tl.maximum(begin - before, 0)
        last = tl.minimum(end - before, pages)
        before += pages
        if first < last:
            rows = load_query(plain, head_stride, turned, f, SHAPE)
            of_list = extents_of(extents, unit, f, SHAPE)
            maximum, weights, values = attend_list(
                rows, cache, blocks, of_list, first, last, scale, f, SHAPE, STAGES
            )
            to = out + f * SHAPE.part_floats
            store_part(to, lse + f, maximum, weights, values, f, SHAPE)
        else:
            store_no_part(lse + f, SHAPE)

    first = tl.maximum(begin - before, 0)
    last = tl.minimum(end - before, tail_pages)
    if first < last:
        maximum, weights, values = empty_state(LISTS, SHAPE)
        maximum, weights, values = attend_slots(
            load_query(plain, head_stride, turned, LISTS, SHAPE),
            cache,
            blocks,
            tail_block,
            layer * SHAPE.num_kv_heads + head,
            first,
            last,
            tail_tokens,
            scale,
            maximum,
            weights,
            values,
            LISTS,
            SHAPE,
            STAGES,
        )
        to = out + LISTS * SHAPE.part_floats
        store_part(to, lse + LISTS, maximum, weights, values, LISTS, SHAPE)
    else:
        store_no_part(lse + LISTS, SHAPE)
