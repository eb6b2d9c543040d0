"""Where a query's request and its pages are."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_request(query_rows, lengths, leases, index):
    """A query's row of the block table, its length, and its lease (0, 0 for none or padding)."""
    length = tl.load(lengths + index)
    row = tl.load(query_rows + index, mask=length > 0, other=0).to(tl.int64)
    first_block = tl.load(leases + 2 * row, mask=length > 0, other=0)
    tail_block = tl.load(leases + 2 * row + 1, mask=length > 0, other=0)
    return row, length, first_block, tail_block


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
