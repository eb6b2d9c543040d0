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

from .read_pages import directions, read_elements, read_key_codes, read_slots, read_value_codes


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
            COLUMNS: tl.constexpr = LIST.padded_value_row * LIST.fields
            field_byte = tl.arange(0, COLUMNS)
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
