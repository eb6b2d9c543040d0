"""Tokens to pages: gather a list's tokens, convert them, and write its pages whole.

:mod:`mdkv_vllm.core.packing` is the specification. A program makes one page, from its first byte to
its last, so nothing needs clearing before. Grids are as large as the longest lists could be, and
programs without a page end at once.

Codes take the scales that the losses found: finding them takes longer than reading them.

Bytes: each kept token's vectors and scales read once, each page written once.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .elements import store_elements
from .paged import key_offsets, load_rows, matrix_of, rotated_rows
from .prompt_shape import CandidateShape, PromptShape, SpaceShape
from .quantize import byte_of, codes_of, tile_vectors
from .shapes import KernelConstant, ListShape, padded
from .window_scores import page_of


@dataclass(frozen=True, repr=False)
class PackShape(ListShape, KernelConstant):
    """How one format is packed.

    Attributes:
        page_bytes: bytes of a page.
        space: the format's space.
        candidate: which of ``SHAPE.candidates`` it is; none for tokens as they are.
    """

    page_bytes: int
    space: SpaceShape
    candidate: int

    @classmethod
    def of(cls, shape: PromptShape, index: int) -> PackShape:
        """For one of a model's formats."""
        geometry, fmt = shape.layout.geometry, shape.layout.formats.formats[index]
        space = CandidateShape(fmt, geometry, shape.basis_rank).space
        candidate = shape.options[index + shape.drops]
        return cls(fmt, shape.element, geometry.page_bytes, space, candidate)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile: no more than a page has."""
        return min(tile_vectors(self.padded_rank), padded(self.tokens_per_page))

    @property
    def bytes_of_rows(self) -> int:
        """Bytes of every K row that a tile makes."""
        return self.tile_tokens // self.fields


@triton.jit
def slot_tokens(tokens, slot, valid, count):
    """Tokens of some slots of a page, and which of them hold one.

    Args:
        tokens: pointer to the int32 tokens of the page.
        slot: slots, ``[slots]``.
        valid: which of them exist, ``[slots]``.
        count: tokens of the page.
    """
    held = valid & (slot < count)
    return tl.load(tokens + slot, mask=held, other=0), held


@triton.jit
def load_vectors(
    cache, blocks, layer_page, token, held, matrix, column, wanted, LIST: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Vectors of some tokens in the list's space, float32; of codes, over its norm.

    Args:
        cache: the cache, as elements; of values, ``dims`` further.
        blocks: pointer to the prompt's int32 blocks.
        layer_page: of the layer and head, in every block.
        token: see :func:`slot_tokens`; ``held`` as well.
        matrix: of the space, see :func:`.paged.matrix_of`.
        column: dimensions of the space, ``[columns]``.
        wanted: which of them exist.
    """
    offsets = key_offsets(blocks, layer_page, token, held, SHAPE)
    SPACE: tl.constexpr = LIST.space
    if SPACE.moves:
        rows = rotated_rows(cache, offsets, held, matrix, column, wanted, SPACE)
        if not LIST.quantized:
            rows *= SPACE.norm
    else:
        rows = load_rows(cache, offsets, held, 0, LIST.rank, LIST.padded_rank).to(tl.float32)
    return rows


@triton.jit
def pack_key_codes(
    cache, blocks, layer_page, tokens, count, matrix, code_scales, page, LIST: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Write the K codes and scales of a page.

    Arguments are those of :func:`slot_tokens` and :func:`load_vectors`; and ``code_scales``, a
    pointer to the scales of the head's keys by token, uint16.

    Field ``f`` of byte ``j`` of a row is the code of token ``f * key_row + j``. The fields of eight
    bytes are eight rows of a tile apart: the matrix units give a thread rows of that distance.
    """
    FIELDS: tl.constexpr = LIST.fields
    COLUMNS: tl.constexpr = LIST.bytes_of_rows
    NEAR: tl.constexpr = min(8, COLUMNS)
    RANK: tl.constexpr = LIST.padded_rank
    column_dim = tl.arange(0, RANK)
    wanted = column_dim < LIST.rank
    dim = column_dim[None, :]
    scales = (page + LIST.scales_offset).to(tl.pointer_type(tl.uint16))
    for first in range(0, LIST.key_row, COLUMNS):
        in_tile = tl.arange(0, FIELDS * COLUMNS)
        byte = first + in_tile // (FIELDS * NEAR) * NEAR + in_tile % NEAR
        field = in_tile // NEAR % FIELDS
        slot = field * LIST.key_row + byte
        valid = byte < LIST.key_row
        token, held = slot_tokens(tokens, slot, valid, count)
        x = load_vectors(
            cache, blocks, layer_page, token, held, matrix, column_dim, wanted, LIST, SHAPE
        )
        scale = tl.load(code_scales + token, mask=held, other=0)
        codes = codes_of(x, scale, LIST.space.norm, LIST.bits)
        tl.store(scales + slot, scale, mask=valid)
        weight = tl.where(held, 1 << (field * LIST.bits), 0).to(tl.float32)
        codes = tl.reshape(codes * weight[:, None], [COLUMNS // NEAR, FIELDS, NEAR, RANK])
        packed = tl.reshape(tl.sum(codes, axis=1), [COLUMNS, RANK])
        column = first + tl.arange(0, COLUMNS)[:, None]
        mask = (column < LIST.key_row) & (dim < LIST.rank)
        tl.store(page + dim * LIST.key_row + column, byte_of(packed), mask=mask)


@triton.jit
def pack_value_codes(
    cache, blocks, layer_page, tokens, count, matrix, code_scales, page, LIST: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Write the V codes and scales of a page; arguments as for :func:`pack_key_codes`.

    Field ``f`` of byte ``j`` of a row is the code of dimension ``f * value_row + j``.
    """
    FIELDS: tl.constexpr = LIST.fields
    BYTES: tl.constexpr = LIST.padded_value_row
    TOKENS: tl.constexpr = LIST.tile_tokens
    column = tl.arange(0, FIELDS * BYTES)
    byte = column % BYTES
    field = column // BYTES
    wanted = byte < LIST.value_row
    scales = (page + LIST.scales_offset).to(tl.pointer_type(tl.uint16)) + LIST.tokens_per_page
    rows = page + LIST.section_bytes
    for first in range(0, LIST.tokens_per_page, TOKENS):
        slot = first + tl.arange(0, TOKENS)
        valid = slot < LIST.tokens_per_page
        token, held = slot_tokens(tokens, slot, valid, count)
        x = load_vectors(
            cache + SHAPE.dims, blocks, layer_page, token, held, matrix,
            field * LIST.value_row + byte, wanted, LIST, SHAPE,
        )  # fmt: skip
        scale = tl.load(code_scales + token, mask=held, other=0)
        codes = codes_of(x, scale, LIST.space.norm, LIST.bits)
        tl.store(scales + slot, scale, mask=valid)
        weight = (1 << (field * LIST.bits))[None, :].to(tl.float32)
        codes = codes * tl.where(held[:, None], weight, 0.0)
        packed = tl.sum(tl.reshape(codes, [TOKENS, FIELDS, BYTES]), axis=1)
        in_row = tl.arange(0, BYTES)[None, :]
        mask = valid[:, None] & (in_row < LIST.value_row)
        tl.store(rows + slot[:, None] * LIST.value_row + in_row, byte_of(packed), mask=mask)


@triton.jit
def pack_elements(
    cache, blocks, layer_page, tokens, count, key_matrix, value_matrix, page, LIST: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Write a page of elements of the cache's type; arguments as for :func:`load_vectors`."""
    RANK: tl.constexpr = LIST.padded_rank
    CAPACITY: tl.constexpr = LIST.tokens_per_page
    column = tl.arange(0, RANK)
    wanted = column < LIST.rank
    dim = column[None, :]
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
        token, held = slot_tokens(tokens, slot, valid, count)
        x = load_vectors(
            cache, blocks, layer_page, token, held, key_matrix, column, wanted, LIST, SHAPE
        )
        store_elements(page, key_at, x, mask, LIST.element)
        x = load_vectors(
            cache + SHAPE.dims, blocks, layer_page, token, held, value_matrix, column, wanted, LIST,
            SHAPE,
        )  # fmt: skip
        store_elements(page, value_at, x, mask, LIST.element)


@triton.jit(do_not_specialize=["first_layer", "span", "num_pages"])
def pack_list_page(
    cache, blocks, hadamard, key_basis, value_basis, first_layer, order, table, span, code_scales,
    pages, num_pages, LIST: tl.constexpr, FORMAT: tl.constexpr, FORMATS: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Make one page of one format. Grid: pages that the longest list may have, rows.

    Args:
        cache: the cache, as elements.
        blocks: int32, of the prompt.
        hadamard: see :func:`.paged.matrix_of`; ``key_basis`` and ``value_basis`` as well.
        order: int32 ``[rows, FORMATS, span]``, see :func:`.place.order_tokens`.
        table: int64 ``[rows, FORMATS, 2]``, see :func:`.place.first_pages`.
        code_scales: of all tokens, see :func:`.token_sum_kernels.token_sums`.
        pages: written, uint8 ``[num_pages, page_bytes]``; a page beyond them is not.
        FORMAT: which format.
    """
    SPACE: tl.constexpr = LIST.space
    number = tl.program_id(0)
    row = tl.program_id(1)
    entry = row * FORMATS + FORMAT
    first = number * LIST.tokens_per_page
    count = tl.load(table + 2 * entry) - first
    at = tl.load(table + 2 * entry + 1) + number
    if (count > 0) & (at < num_pages):
        page = pages + at * LIST.page_bytes
        tokens = order + entry.to(tl.int64) * span + first
        layer_page = page_of(first_layer, row, SHAPE)
        key_matrix = matrix_of(hadamard, key_basis, row, SPACE)
        value_matrix = matrix_of(hadamard, value_basis, row, SPACE)
        if LIST.quantized:
            rows = tl.num_programs(1).to(tl.int64)
            key_scales = code_scales + (2 * LIST.candidate * rows + row) * span
            pack_key_codes(
                cache, blocks, layer_page, tokens, count, key_matrix, key_scales, page, LIST, SHAPE
            )
            pack_value_codes(
                cache, blocks, layer_page, tokens, count, value_matrix, key_scales + rows * span,
                page, LIST, SHAPE,
            )  # fmt: skip
        else:
            pack_elements(
                cache, blocks, layer_page, tokens, count, key_matrix, value_matrix, page, LIST,
                SHAPE,
            )  # fmt: skip
        for start in range(LIST.used_bytes, LIST.page_bytes, 128):
            byte = start + tl.arange(0, 128)
            tl.store(page + byte, tl.zeros([128], tl.uint8), mask=byte < LIST.page_bytes)
