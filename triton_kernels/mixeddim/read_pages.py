"""Pages of one list back in the model's space, for each way in which tokens lie in them."""

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
        hadamard: see :func:`.read_kernels.read_sources`.
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
    FIELDS: tl.constexpr = LIST.fields
    BITS: tl.constexpr = LIST.bits
    column = tl.arange(0, LIST.columns)
    for tile in range(first * LIST.chunks, last * LIST.chunks):
        number = tile // LIST.chunks
        start = tile % LIST.chunks * LIST.columns
        page = lease_page(cache, blocks, first_block, first_page + number, SHAPE)
        scales = (page + LIST.scales_offset).to(tl.pointer_type(tl.uint16))
        packed = load_byte_rows(page, start, PART, SHAPE)
        for field in tl.static_range(FIELDS):
            in_page = field * LIST.key_row + start + column
            token = number * LIST.tokens_per_page + in_page
            exists = (start + column < LIST.key_row) & (token < num_tokens)
            scale = float_of_bfloat16(tl.load(scales + in_page, mask=exists, other=0))
            codes = unpack_field(packed, BITS, field, TYPE) - tl.full([], LIST.bias, TYPE)
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
    BITS: tl.constexpr = LIST.bits
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
        codes = unpack(packed, TOKENS, BYTES, BITS, TYPE) - tl.full([], LIST.bias, TYPE)
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
