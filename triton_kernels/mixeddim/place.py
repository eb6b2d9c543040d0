"""Which tokens are in which list, and where the lists' pages start: counts and scans, no sort."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(1024)
"""Tokens, or lists, at a time."""


@triton.jit(do_not_specialize=["span"])
def order_tokens(choice, span, order, FORMATS: tl.constexpr):
    """List the tokens of each format of a row, by position. Grid: rows.

    Args:
        choice: int8 ``[rows, span]``, a format, or -1.
        order: written, int32 ``[rows, FORMATS, span]``: the tokens of each list, then nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    choice += row * span
    order += row * FORMATS * span
    for fmt in tl.static_range(FORMATS):
        held = tl.zeros([1], tl.int32)
        for first in tl.range(0, span, TILE):
            token = first + tl.arange(0, TILE)
            mine = tl.load(choice + token, mask=token < span, other=-1) == fmt
            counted = mine.to(tl.int32)
            place = held + tl.cumsum(counted, axis=0) - 1
            tl.store(order + fmt * span + place, token, mask=mine)
            held += tl.sum(counted, axis=0)


@triton.jit(do_not_specialize=["lists"])
def first_pages(tokens, capacity, first, lists, table, end, FORMATS: tl.constexpr):
    """Where each list starts. Grid: one program.

    Args:
        tokens: int64 ``[lists]``, of each list, formats innermost.
        capacity: int64 ``[FORMATS]``, tokens of a page.
        first: int64 of one element, the first list's first page.
        table: written, int64 ``[lists, 2]``: tokens and first page.
        end: written, int64 of one element, the page behind the last list.
    """
    page = tl.load(first + tl.zeros([1], tl.int32))
    for start in tl.range(0, lists, TILE):
        number = start + tl.arange(0, TILE)
        exists = number < lists
        count = tl.load(tokens + number, mask=exists, other=0)
        each = tl.load(capacity + number % FORMATS)
        pages = tl.where(exists, (count + each - 1) // each, 0)
        ends = page + tl.cumsum(pages, axis=0)
        tl.store(table + 2 * number, count, mask=exists)
        tl.store(table + 2 * number + 1, ends - pages, mask=exists)
        page += tl.sum(pages, axis=0)
    tl.store(end + tl.zeros([1], tl.int32), page)
