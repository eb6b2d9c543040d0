"""Tokens to pages: gather a list's tokens, convert them, and write its pages whole.

:mod:`mdkv_vllm.core.packing` is the specification. A program makes one page, from its first byte to
its last, so nothing needs clearing before. Which tokens a page holds, and where its list starts,
comes from a sort by choice and cumulative sums on the device; grids are as large as
the longest lists could be, and programs without a page end at once.

Bytes: each kept token's vectors read once, each page written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mdkv_vllm.core.formats import FormatSet, PageGeometry

from .elements import element_type, store_elements
from .quantise import gaussian_step, load_vectors, quantise_rows, tile_vectors
from .shapes import KernelConstant, ListShape


@dataclass(frozen=True, repr=False)
class PackShape(ListShape, KernelConstant):
    """How one format is packed.

    Attributes:
        page_bytes: bytes of a page.
    """

    page_bytes: int

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return tile_vectors(self.padded_rank)

    @property
    def step(self) -> float:
        """First step of the quantiser."""
        return gaussian_step(self.bits)

    @property
    def zero(self) -> float:
        """The code that stands for zero."""
        return self.format.zero

    @property
    def used_bytes(self) -> int:
        """Bytes of a page in use; zeros follow."""
        scales = 4 * self.tokens_per_page if self.quantised else 0
        return 2 * self.section_bytes + scales


@triton.jit
def load_tokens(rows, stride, tokens, slot, valid, count, PADDED: tl.constexpr, LIST: tl.constexpr):
    """Vectors of some slots of a page, and which of them hold a token.

    Args:
        rows: pointer to a head's first vector; the others lie ``stride`` elements apart.
        tokens: pointer to the int64 tokens of the page.
        slot: slots, ``[slots]``.
        valid: which of them exist, ``[slots]``.
        count: tokens of the page.
    """
    held = valid & (slot < count)
    token = tl.load(tokens + slot, mask=held, other=0)
    return load_vectors(rows, stride, token, held, LIST.rank, PADDED), held


@triton.jit
def pack_key_codes(keys, stride, tokens, count, page, LIST: tl.constexpr):
    """Write the K codes and scales of a page; arguments as for :func:`load_tokens`.

    Field ``f`` of byte ``j`` of a row is the code of token ``f * key_row + j``.
    """
    FIELDS: tl.constexpr = LIST.fields
    COLUMNS: tl.constexpr = LIST.tile_tokens // FIELDS
    RANK: tl.constexpr = LIST.padded_rank
    dim = tl.arange(0, RANK)[None, :]
    scales = (page + 2 * LIST.section_bytes).to(tl.pointer_type(tl.uint16))
    for first in range(0, LIST.key_row, COLUMNS):
        in_tile = tl.arange(0, FIELDS * COLUMNS)
        byte = first + in_tile % COLUMNS
        field = in_tile // COLUMNS
        slot = field * LIST.key_row + byte
        valid = byte < LIST.key_row
        x, held = load_tokens(keys, stride, tokens, slot, valid, count, RANK, LIST)
        codes, scale = quantise_rows(x, dim < LIST.rank, LIST.rank, LIST.bits, LIST.step)
        tl.store(scales + slot, tl.where(held, scale, 0), mask=valid)
        codes = tl.where(held[:, None], codes + LIST.zero, 0.0).to(tl.int32)
        codes = codes << (field * LIST.bits)[:, None]
        packed = tl.sum(tl.reshape(codes, [FIELDS, COLUMNS, RANK]), axis=0)
        column = first + tl.arange(0, COLUMNS)[:, None]
        mask = (column < LIST.key_row) & (dim < LIST.rank)
        tl.store(page + dim * LIST.key_row + column, packed.to(tl.uint8), mask=mask)


@triton.jit
def pack_value_codes(values, stride, tokens, count, page, LIST: tl.constexpr):
    """Write the V codes and scales of a page; arguments as for :func:`load_tokens`.

    Field ``f`` of byte ``j`` of a row is the code of dimension ``f * value_row + j``.
    """
    FIELDS: tl.constexpr = LIST.fields
    BYTES: tl.constexpr = LIST.padded_value_row
    TOKENS: tl.constexpr = LIST.tile_tokens
    column = tl.arange(0, FIELDS * BYTES)
    byte = column % BYTES
    field = column // BYTES
    exists = (byte < LIST.value_row)[None, :]
    scales = (page + 2 * LIST.section_bytes).to(tl.pointer_type(tl.uint16)) + LIST.tokens_per_page
    rows = page + LIST.section_bytes
    for first in range(0, LIST.tokens_per_page, TOKENS):
        slot = first + tl.arange(0, TOKENS)
        valid = slot < LIST.tokens_per_page
        held = valid & (slot < count)
        token = tl.load(tokens + slot, mask=held, other=0)
        at = values + token[:, None] * stride + (field * LIST.value_row + byte)[None, :]
        x = tl.load(at, mask=held[:, None] & exists, other=0).to(tl.float32)
        codes, scale = quantise_rows(x, exists, LIST.rank, LIST.bits, LIST.step)
        tl.store(scales + slot, tl.where(held, scale, 0), mask=valid)
        codes = tl.where(held[:, None], codes + LIST.zero, 0.0).to(tl.int32)
        codes = codes << (field * LIST.bits)[None, :]
        packed = tl.sum(tl.reshape(codes, [TOKENS, FIELDS, BYTES]), axis=1)
        in_row = tl.arange(0, BYTES)[None, :]
        mask = valid[:, None] & (in_row < LIST.value_row)
        tl.store(rows + slot[:, None] * LIST.value_row + in_row, packed.to(tl.uint8), mask=mask)


@triton.jit
def pack_elements(keys, key_stride, values, value_stride, tokens, count, page, LIST: tl.constexpr):
    """Write a page of elements of the cache's type; arguments as for :func:`load_tokens`."""
    RANK: tl.constexpr = LIST.padded_rank
    CAPACITY: tl.constexpr = LIST.tokens_per_page
    dim = tl.arange(0, RANK)[None, :]
    for first in range(0, CAPACITY, LIST.tile_tokens):
        slot = first + tl.arange(0, LIST.tile_tokens)
        valid = slot < CAPACITY
        mask = valid[:, None] & (dim < LIST.rank)
        if LIST.in_slots:
            key_at = slot[:, None] * (2 * LIST.rank) + dim
            value_at = key_at + LIST.rank
        else:
            key_at = dim * CAPACITY + slot[:, None]
            value_at = (CAPACITY + slot)[:, None] * LIST.rank + dim
        x, _ = load_tokens(keys, key_stride, tokens, slot, valid, count, RANK, LIST)
        store_elements(page, key_at, x, mask, LIST.element)
        x, _ = load_tokens(values, value_stride, tokens, slot, valid, count, RANK, LIST)
        store_elements(page, value_at, x, mask, LIST.element)


@triton.jit(do_not_specialize=["span", "num_pages"])
def pack_list_page(
    keys,
    key_head_stride,
    key_stride,
    values,
    value_head_stride,
    value_stride,
    order,
    lists,
    span,
    pages,
    num_pages,
    LIST: tl.constexpr,
    FORMAT: tl.constexpr,
    FORMATS: tl.constexpr,
):
    """Make one page of one format. Grid: pages that the longest list may have, heads.

    Args:
        keys: ``[heads, span, rank]``, strides of the first two in elements; ``values`` likewise.
        order: int64 ``[heads, span]``, tokens by choice, then by position.
        lists: int64 ``[heads, FORMATS, 3]``: tokens of the list, where it starts in ``order``,
            and its first page.
        pages: written, uint8 ``[num_pages, page_bytes]``; a page beyond them is not.
        FORMAT: which format.
    """
    number = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    entry = lists + (head * FORMATS + FORMAT) * 3
    first = number * LIST.tokens_per_page
    count = tl.load(entry) - first
    at = tl.load(entry + 2) + number
    if (count > 0) & (at < num_pages):
        page = pages + at * LIST.page_bytes
        tokens = order + head * span + tl.load(entry + 1) + first
        keys += head * key_head_stride
        values += head * value_head_stride
        if LIST.quantised:
            pack_key_codes(keys, key_stride, tokens, count, page, LIST)
            pack_value_codes(values, value_stride, tokens, count, page, LIST)
        else:
            pack_elements(keys, key_stride, values, value_stride, tokens, count, page, LIST)
        for start in range(LIST.used_bytes, LIST.page_bytes, 128):
            byte = start + tl.arange(0, 128)
            tl.store(page + byte, tl.zeros([128], tl.uint8), mask=byte < LIST.page_bytes)


def list_table(
    choice: torch.Tensor, formats: FormatSet, first_page: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are in which list, on the device.

    Args:
        choice: integer ``[kv_heads, span]``, index into ``formats.formats``, or -1.
        formats: the formats allowed.
        first_page: where the first list starts, int64 of one element.

    Returns:
        int64 ``[kv_heads, span]``, tokens by choice and then by position; and int64 ``[kv_heads,
        formats, 3]``: tokens of each list, where it starts in the former, and its first page.
    """
    # One byte sorts faster than eight.
    order = choice.to(torch.int8).argsort(dim=1, stable=True)
    index = torch.arange(-1, len(formats.formats), device=choice.device)
    tokens = (choice.unsqueeze(-1) == index).sum(1)
    starts = tokens.cumsum(1) - tokens
    tokens, starts = tokens[:, 1:], starts[:, 1:]
    pages = torch.stack(
        [-(tokens[:, i] // -f.tokens_per_page) for i, f in enumerate(formats.formats)], 1
    )
    ends = pages.flatten().cumsum(0).view_as(pages)
    return order, torch.stack((tokens, starts, ends - pages + first_page), -1)


def pack(
    vectors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    formats: FormatSet,
    choice: torch.Tensor,
    geometry: PageGeometry,
    pages: torch.Tensor,
    first_page: torch.Tensor,
) -> None:
    """See :meth:`mdkv_vllm.core.kernels.CompressionKernels.pack`; any float type.

    Nothing waits for the device.

    Args:
        vectors: per format, K and V of every span token in its space,
            ``[kv_heads, span, rank]``, innermost contiguous.
        formats: the formats allowed.
        choice: integer ``[kv_heads, span]``, index into ``formats.formats``, or -1.
        geometry: the cache's sizes.
        pages: written, uint8 ``[pages, page_bytes]``, contiguous; those beyond the lists are left.
        first_page: the first page of the first list, int64 of one element.
    """
    heads, span = choice.shape
    order, lists = list_table(choice, formats, first_page)
    for index, fmt in enumerate(formats.formats):
        keys, values = vectors[index]
        shape = PackShape(fmt, element_type(geometry.dtype), geometry.page_bytes)
        pack_list_page[(fmt.pages(span), heads)](
            keys,
            *keys.stride()[:2],
            values,
            *values.stride()[:2],
            order,
            lists,
            span,
            pages,
            pages.shape[0],
            LIST=shape,
            FORMAT=index,
            FORMATS=len(formats.formats),
        )
