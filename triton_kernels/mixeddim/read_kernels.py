"""Tokens of leases back in the model's space, and full-dimension tokens beside them.

A program takes a share of one source's pages, see :class:`mdkv_vllm.kernels.interface.Sources`. It
multiplies what it unpacks with the directions of the format's space: keys first, then values, and
a block of the head's dimensions after the other, so that one block of directions is held at a time.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import lease_page
from .codes import load_byte_rows, unpack, unpack_field
from .elements import float_of_bfloat16, store_elements
from .rotate import basis_rows
from .softmax import dot


@triton.jit
def directions(
    hadamard, calibrated, cache, blocks, first_block, layer, head, column, wanted, block,
    SIDE: tl.constexpr, PART: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Some directions of a list's space, in one block of the head's dimensions.

    Args:
        hadamard: see :func:`read_sources`.
        calibrated: pointer to float32 ``[kv_heads, basis_rank, head_size]`` of keys or values.
        column: directions, ``[columns]``.
        wanted: which of them exist.
        block: which block.

    Returns:
        ``[columns, out_dims]`` of the list's ``dot_type``, zero outside.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    dim = block * SHAPE.out_dims + tl.arange(0, SHAPE.out_dims)
    if LIST.in_hadamard:
        mask = wanted[:, None] & (dim < SHAPE.head_size)[None, :]
        at = column[:, None] * SHAPE.head_size + dim[None, :]
        found = tl.load(hadamard + at, mask=mask, other=0)
    else:
        found = basis_rows(
            calibrated, cache, blocks, first_block, layer, head, column, wanted, dim, SIDE, SHAPE
        )
    return found.to(LIST.dot_type)


@triton.jit
def store_rows(to, target, token, exists, rows, block, SHAPE: tl.constexpr, OUT: tl.constexpr):
    """Store float32 ``[tokens, out_dims]`` as one block of the dimensions of some rows.

    Args:
        to: pointer to uint8, keys or values.
        target: row of the list's first token.
        token: numbers in the list, ``[tokens]``.
        exists: which of them do.
    """
    dim = block * SHAPE.out_dims + tl.arange(0, SHAPE.out_dims)
    mask = exists[:, None] & (dim < SHAPE.head_size)[None, :]
    at = (target + token)[:, None] * SHAPE.head_size + dim[None, :]
    store_elements(to, at, rows, mask, OUT)


@triton.jit
def read_key_codes(
    matrix, cache, blocks, first_block, first_page, first, last, num_tokens, to, target, block,
    PART: tl.constexpr, SHAPE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Read the keys of pages of codes.

    Args:
        matrix: ``[padded_rank, out_dims]``, see :func:`directions`.
        first_page: page of the lease at which the list starts.
        first: first page of the list to read.
        last: one past the last.
        num_tokens: tokens in the list.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    NORM: tl.constexpr = SHAPE.norms[PART]
    TYPE: tl.constexpr = LIST.dot_type
    column = tl.arange(0, LIST.columns)
    for tile in range(first * LIST.chunks, last * LIST.chunks):
        number = tile // LIST.chunks
        start = tile % LIST.chunks * LIST.columns
        page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        scales = (page + LIST.scales_offset).to(tl.pointer_type(tl.uint16))
        packed = load_byte_rows(page, start, PART, SHAPE)
        for field in tl.static_range(LIST.fields):
            in_page = field * LIST.key_row + start + column
            token = number * LIST.tokens_per_page + in_page
            exists = (start + column < LIST.key_row) & (token < num_tokens)
            scale = float_of_bfloat16(tl.load(scales + in_page, mask=exists, other=0))
            codes = unpack_field(packed, LIST.bits, field, TYPE) - tl.full([], LIST.bias, TYPE)
            rows = dot(tl.trans(codes), matrix, None) * (scale * NORM)[:, None]
            store_rows(to, target, token, exists, rows, block, SHAPE, OUT)


@triton.jit
def read_value_codes(
    matrix, cache, blocks, first_block, first_page, first, last, num_tokens, to, target, block,
    PART: tl.constexpr, SHAPE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Read the values of pages of codes; see :func:`read_key_codes`.

    Args:
        matrix: ``[padded_value_row * fields, out_dims]``: row ``f * padded_value_row + j`` is the
            direction of field ``f`` of byte ``j``.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    NORM: tl.constexpr = SHAPE.norms[PART]
    TYPE: tl.constexpr = LIST.dot_type
    BYTES: tl.constexpr = LIST.padded_value_row
    TOKENS: tl.constexpr = SHAPE.value_tokens
    TILES: tl.constexpr = (LIST.tokens_per_page + TOKENS - 1) // TOKENS
    byte = tl.arange(0, BYTES)[None, :]
    for tile in range(first * TILES, last * TILES):
        number = tile // TILES
        in_page = tile % TILES * TOKENS + tl.arange(0, TOKENS)
        token = number * LIST.tokens_per_page + in_page
        exists = (in_page < LIST.tokens_per_page) & (token < num_tokens)
        page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        scales = (page + LIST.scales_offset).to(tl.pointer_type(tl.uint16)) + LIST.tokens_per_page
        at = page + LIST.section_bytes + in_page[:, None] * LIST.value_row + byte
        packed = tl.load(at, mask=exists[:, None] & (byte < LIST.value_row), other=0)
        scale = float_of_bfloat16(tl.load(scales + in_page, mask=exists, other=0))
        codes = unpack(packed, TOKENS, BYTES, LIST.bits, TYPE) - tl.full([], LIST.bias, TYPE)
        rows = dot(codes, matrix, None) * (scale * NORM)[:, None]
        store_rows(to, target, token, exists, rows, block, SHAPE, OUT)


@triton.jit
def read_elements(
    matrix, cache, blocks, first_block, first_page, first, last, num_tokens, to, target, block,
    SIDE: tl.constexpr, PART: tl.constexpr, SHAPE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Read keys (side 0) or values (side 1) of a lower rank; see :func:`read_key_codes`."""
    LIST: tl.constexpr = SHAPE.parts[PART]
    CAPACITY: tl.constexpr = LIST.tokens_per_page
    dim = tl.arange(0, LIST.padded_rank)
    for tile in range(first * LIST.chunks, last * LIST.chunks):
        number = tile // LIST.chunks
        in_page = tile % LIST.chunks * LIST.columns + tl.arange(0, LIST.columns)
        token = number * CAPACITY + in_page
        exists = (in_page < CAPACITY) & (token < num_tokens)
        page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        page = page.to(tl.pointer_type(LIST.element))
        if SIDE == 0:
            at = dim[:, None] * CAPACITY + in_page[None, :]
            low = tl.load(page + at, mask=(dim < LIST.rank)[:, None] & exists[None, :], other=0)
            low = tl.trans(low)
        else:
            at = (CAPACITY + in_page)[:, None] * LIST.rank + dim[None, :]
            low = tl.load(page + at, mask=exists[:, None] & (dim < LIST.rank)[None, :], other=0)
        store_rows(to, target, token, exists, dot(low, matrix, None), block, SHAPE, OUT)


@triton.jit
def read_slots(
    cache, blocks, first_block, first_page, first, last, num_tokens, keys, values, target,
    PART: tl.constexpr, SHAPE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Read full tokens; arguments are those of :func:`.pages.attend_slots`."""
    LIST: tl.constexpr = SHAPE.parts[PART]
    BLOCK_SIZE: tl.constexpr = SHAPE.block_size
    TOKENS: tl.constexpr = LIST.columns
    dim = tl.arange(0, LIST.padded_rank)
    end = tl.minimum(num_tokens, last * BLOCK_SIZE)
    for start in range(first * BLOCK_SIZE, end, TOKENS):
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
        at = (target + token)[:, None] * LIST.rank + dim[None, :]
        for side in tl.static_range(2):
            rows = tl.load(slots[:, None] + side * LIST.rank + dim[None, :], mask=mask, other=0)
            store_elements(values if side else keys, at, rows.to(tl.float32), mask, OUT)


@triton.jit
def read_list(
    hadamard, basis_keys, basis_values, cache, blocks, first_block, layer, head, first_page, first,
    last, num_tokens, keys, values, target, PART: tl.constexpr, SHAPE: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Read pages of a list that are in another space than the model's."""
    LIST: tl.constexpr = SHAPE.parts[PART]
    for block in range(SHAPE.out_blocks):
        column = tl.arange(0, LIST.padded_rank)
        matrix = directions(
            hadamard, basis_keys, cache, blocks, first_block, layer, head, column,
            column < LIST.rank, block, 0, PART, SHAPE,
        )  # fmt: skip
        if LIST.quantized:
            read_key_codes(
                matrix, cache, blocks, first_block, first_page, first, last, num_tokens, keys,
                target, block, PART, SHAPE, OUT,
            )  # fmt: skip
        else:
            read_elements(
                matrix, cache, blocks, first_block, first_page, first, last, num_tokens, keys,
                target, block, 0, PART, SHAPE, OUT,
            )  # fmt: skip
    for block in range(SHAPE.out_blocks):
        if LIST.quantized:
            field_byte = tl.arange(0, LIST.padded_value_row * LIST.fields)
            in_row = field_byte % LIST.padded_value_row
            column = field_byte // LIST.padded_value_row * LIST.value_row + in_row
            matrix = directions(
                hadamard, basis_values, cache, blocks, first_block, layer, head, column,
                in_row < LIST.value_row, block, 1, PART, SHAPE,
            )  # fmt: skip
            read_value_codes(
                matrix, cache, blocks, first_block, first_page, first, last, num_tokens, values,
                target, block, PART, SHAPE, OUT,
            )  # fmt: skip
        else:
            column = tl.arange(0, LIST.padded_rank)
            matrix = directions(
                hadamard, basis_values, cache, blocks, first_block, layer, head, column,
                column < LIST.rank, block, 1, PART, SHAPE,
            )  # fmt: skip
            read_elements(
                matrix, cache, blocks, first_block, first_page, first, last, num_tokens, values,
                target, block, 1, PART, SHAPE, OUT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "table_stride"])
def read_sources(
    cache, block_table, table_stride, fields, targets, layer, hadamard, basis_keys, basis_values,
    keys, values, SHAPE: tl.constexpr, FIELDS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Read one share of one source's pages. Grid: shares, sources.

    Args:
        cache: uint8 of the whole cache, 16-byte aligned.
        block_table: int32 ``[rows, blocks]``, stride of the first in elements.
        fields: int32 ``[sources, FIELDS]``, see :class:`mdkv_vllm.kernels.interface.Sources`.
        targets: int32 ``[sources]``.
        layer: layer of the model.
        hadamard: ``[head_size, head_size]``, the matrix without its factor.
        basis_keys: float32 ``[kv_heads, basis_rank, head_size]`` of the layer.
        basis_values: same.
        keys: written, uint8 of ``[rows, head_size]``.
        values: written, same.
        OUT: the type of keys and values.
    """
    LISTS: tl.constexpr = SHAPE.num_lists
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    source = tl.program_id(1)
    row = tl.load(fields + source * FIELDS).to(tl.int64)
    head = tl.load(fields + source * FIELDS + 1)
    first_block = tl.load(fields + source * FIELDS + 2)
    full_tokens = tl.load(fields + source * FIELDS + 4)
    target = tl.load(targets + source).to(tl.int64)
    blocks = block_table + row * table_stride
    head_of_model = layer * SHAPE.num_kv_heads + head
    if full_tokens > 0:
        pages = tl.cdiv(full_tokens, SHAPE.block_size)
        share = tl.cdiv(pages, splits)
        first = split * share
        last = tl.minimum(first + share, pages)
        if first < last:
            read_slots(
                cache, blocks, first_block, head_of_model, first, last, full_tokens, keys, values,
                target, LISTS, SHAPE, OUT,
            )  # fmt: skip
    else:
        # A page table never spans blocks, and a block's pages are contiguous.
        lease = tl.load(blocks + first_block).to(tl.int64)
        table = (cache + lease * (SHAPE.pages_per_block * SHAPE.page_bytes)).to(
            tl.pointer_type(tl.int32)
        ) + head_of_model * (2 * LISTS)
        total = 0
        for f in tl.static_range(LISTS):
            total += tl.cdiv(tl.load(table + 2 * f), SHAPE.parts[f].tokens_per_page)
        share = tl.cdiv(total, splits)
        begin = split * share
        end = begin + share
        before = 0  # pages of the lists so far
        for f in tl.static_range(LISTS):
            tokens = tl.load(table + 2 * f)
            first_page = tl.load(table + 2 * f + 1)
            pages = tl.cdiv(tokens, SHAPE.parts[f].tokens_per_page)
            first = tl.maximum(begin - before, 0)
            last = tl.minimum(end - before, pages)
            if first < last:
                if SHAPE.parts[f].in_slots:
                    read_slots(
                        cache, blocks, first_block, first_page, first, last, tokens, keys, values,
                        target, f, SHAPE, OUT,
                    )  # fmt: skip
                else:
                    read_list(
                        hadamard, basis_keys, basis_values, cache, blocks, first_block, layer, head,
                        first_page, first, last, tokens, keys, values, target, f, SHAPE, OUT,
                    )  # fmt: skip
            before += pages
            target += tokens
