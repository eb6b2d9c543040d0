"""Where a query's request is, its leases, and the pages of its lists.

What a unit (a query and a KV head) holds is looked up once, by ``prepare_units``, and written down
for the programs that share its pages: a *record* of the unit and, of each list, an *extent* per
lease. Pages and tokens of a list are counted through all leases, as if all pages before were full.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

ROW = tl.constexpr(0)
"""Word of a record: the row of the block table."""
TAIL_BLOCK = tl.constexpr(1)
"""Where the tail starts; 0 without a lease."""
FIRST_BLOCK = tl.constexpr(2)
"""Where the first lease starts."""
TAIL_TOKENS = tl.constexpr(3)
"""Tokens of the tail."""
FIRST_LIST = tl.constexpr(4)
"""From here on the pages of every list, in all leases."""

END = tl.constexpr(0)
"""Word of an extent: the page of the list behind the lease's last."""
UNTIL = tl.constexpr(1)
"""The token behind the lease's last."""
ORIGIN = tl.constexpr(2)
"""The page of the lease that page 0 of the list would be."""
LEASE_BLOCK = tl.constexpr(3)
"""Where the lease starts in the row."""
EXTENT_WORDS = tl.constexpr(4)


@triton.jit
def record_of(records, unit, SHAPE: tl.constexpr):
    """A unit's record in int32 ``[units, FIRST_LIST + lists]``."""
    return records + unit * (FIRST_LIST + SHAPE.num_lists)


@triton.jit
def extents_of(extents, unit, LIST: tl.constexpr, SHAPE: tl.constexpr):
    """A list's extents in int32 ``[units, lists, EXTENT_WORDS, max_leases]``."""
    return extents + (unit * SHAPE.num_lists + LIST) * (EXTENT_WORDS * SHAPE.max_leases)


@triton.jit
def find_request(query_rows, lengths, leases, index, SHAPE: tl.constexpr):
    """A query's row of the block table, its length, and where its leases begin and end.

    Returns:
        The row; the length; int32 ``[leases]``, first blocks and blocks behind the last:
        0, 0 behind the row's last lease, and for padding.
    """
    length = tl.load(lengths + index)
    row = tl.load(query_rows + index, mask=length > 0, other=0).to(tl.int64)
    lease = tl.arange(0, triton.next_power_of_2(SHAPE.max_leases))
    exists = lease < tl.where(length > 0, SHAPE.max_leases, 0)
    at = leases + 2 * (row * SHAPE.max_leases + lease)
    first_blocks = tl.load(at, mask=exists, other=0)
    end_blocks = tl.load(at + 1, mask=exists, other=0)
    return row, length, first_blocks, end_blocks


@triton.jit
def write_extents(entries, first_blocks, held, extents, LIST: tl.constexpr, SHAPE: tl.constexpr):
    """Write the extents of a list; its pages in all leases.

    Args:
        entries: where each lease's page table has the list, pointers to int32 ``[leases]``.
        first_blocks: of the leases, ``[leases]``.
        held: which leases there are, ``[leases]``.
        extents: written, the list's.
    """
    LEASES: tl.constexpr = SHAPE.max_leases
    CAPACITY: tl.constexpr = SHAPE.parts[LIST].tokens_per_page
    tokens = tl.load(entries, mask=held, other=0)
    first_page = tl.load(entries + 1, mask=held, other=0)
    pages = tl.cdiv(tokens, CAPACITY)
    ends = tl.cumsum(pages, axis=0)
    before = ends - pages
    lease = tl.arange(0, triton.next_power_of_2(LEASES))
    to = extents + lease
    exists = lease < LEASES
    tl.store(to + END * LEASES, ends, mask=exists)
    tl.store(to + UNTIL * LEASES, before * CAPACITY + tokens, mask=exists)
    tl.store(to + ORIGIN * LEASES, first_page - before, mask=exists)
    tl.store(to + LEASE_BLOCK * LEASES, first_blocks, mask=exists)
    return tl.sum(pages, axis=0)


@triton.jit
def write_record(
    cache,
    block_table,
    table_stride,
    query_rows,
    lengths,
    leases,
    head_of_model,
    index,
    unit,
    records,
    extents,
    SHAPE: tl.constexpr,
):
    """Write down what a unit holds.

    Args:
        cache: pointer to uint8.
        block_table: pointer to int32, rows ``table_stride`` apart.
        query_rows: pointer to int32 ``[queries]``.
        lengths: pointer to int32 ``[queries]``.
        leases: pointer to int32 ``[rows, max_leases, 2]``.
        head_of_model: KV head, counted through the layers.
        index: the query.
        unit: number of the unit.
        records: written, see :func:`record_of`.
        extents: written, see :func:`extents_of`.
    """
    LISTS: tl.constexpr = SHAPE.num_lists
    row, length, first_blocks, end_blocks = find_request(query_rows, lengths, leases, index, SHAPE)
    blocks = block_table + row * table_stride
    lease = tl.arange(0, triton.next_power_of_2(SHAPE.max_leases))
    held = end_blocks > 0
    tail_block = tl.max(end_blocks, axis=0)
    # A page table never spans blocks, and a block's pages are contiguous.
    block = tl.load(blocks + first_blocks, mask=held, other=0).to(tl.int64)
    table = (cache + block * (SHAPE.pages_per_block * SHAPE.page_bytes)).to(
        tl.pointer_type(tl.int32)
    ) + head_of_model * (2 * LISTS)
    record = record_of(records, unit, SHAPE)
    tl.store(record + ROW, row.to(tl.int32))
    tl.store(record + TAIL_BLOCK, tail_block)
    tl.store(record + FIRST_BLOCK, tl.sum(tl.where(lease == 0, first_blocks, 0), axis=0))
    tl.store(record + TAIL_TOKENS, tl.maximum(length - tail_block * SHAPE.block_size, 0))
    for f in tl.static_range(LISTS):
        to = extents_of(extents, unit, f, SHAPE)
        pages = write_extents(table + 2 * f, first_blocks, held, to, f, SHAPE)
        tl.store(record + FIRST_LIST + f, pages)


@triton.jit
def find_extents(extents, first, last, SHAPE: tl.constexpr):
    """The leases in which pages ``first .. last - 1`` of a list lie.

    Args:
        extents: pointer to the list's first extent.

    Returns:
        The first such lease, and one past the last.
    """
    lease = tl.arange(0, triton.next_power_of_2(SHAPE.max_leases))
    at = extents + END * SHAPE.max_leases + lease
    ends = tl.load(at, mask=lease < SHAPE.max_leases, other=2147483647)
    begin = tl.sum((ends <= first).to(tl.int32), axis=0)
    return begin, tl.sum((ends < last).to(tl.int32), axis=0) + 1


@triton.jit
def load_extent(extents, lease, SHAPE: tl.constexpr):
    """A list's extent in a lease: end, until, origin and the lease's first block."""
    LEASES: tl.constexpr = SHAPE.max_leases
    end = tl.load(extents + END * LEASES + lease)
    until = tl.load(extents + UNTIL * LEASES + lease)
    origin = tl.load(extents + ORIGIN * LEASES + lease)
    first_block = tl.load(extents + LEASE_BLOCK * LEASES + lease)
    return end, until, origin, first_block


@triton.jit
def lease_page(cache, blocks, first_block, page, SHAPE: tl.constexpr):
    """Address of a lease's page.

    Args:
        cache: pointer to uint8.
        blocks: pointer to the request's int32 row of the block table.
        first_block: where the lease starts in that row.
        page: number of the page in the lease, of any shape.
    """
    block = tl.load(blocks + first_block + page // SHAPE.pages_per_block).to(tl.int64)
    return cache + (block * SHAPE.pages_per_block + page % SHAPE.pages_per_block) * SHAPE.page_bytes
