"""The kernel before the others: queries in every space, and what units hold."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import find_request, write_record
from .rotate import hadamard, load_basis


@triton.jit
def rotate_query(
    query,
    query_stride,
    head_stride,
    cache,
    block_table,
    table_stride,
    query_rows,
    lengths,
    leases,
    layer,
    basis_keys,
    rotated,
    recent,
    index,
    query_head,
    SHAPE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Bring a query head into the formats' spaces; see :func:`prepare_units`."""
    dim = tl.arange(0, SHAPE.padded_head)
    loaded = tl.load(
        query + index * query_stride + query_head * head_stride + dim,
        mask=dim < SHAPE.head_size,
        other=0,
    )
    number = index * (SHAPE.num_kv_heads * SHAPE.group) + query_head
    if KEEP:
        tl.store(recent + number * SHAPE.head_size + dim, loaded, mask=dim < SHAPE.head_size)
    vector = loaded.to(tl.float32)
    to = rotated + number * SHAPE.rotated_width
    if SHAPE.uses_basis:
        row, _, first_blocks, end_blocks = find_request(query_rows, lengths, leases, index, SHAPE)
        basis = load_basis(
            basis_keys,
            cache,
            block_table + row * table_stride,
            tl.max(first_blocks, axis=0),
            tl.max(end_blocks, axis=0),
            layer,
            query_head // SHAPE.group,
            0,
            SHAPE,
        )
        direction = tl.arange(0, SHAPE.padded_basis)
        low = tl.sum(basis * vector[None, :], axis=1)
        tl.store(to + direction, low, mask=direction < SHAPE.basis_rank)
    if SHAPE.uses_hadamard:
        rotated_vector = hadamard(vector, SHAPE)
        tl.store(to + SHAPE.basis_rank + dim, rotated_vector, mask=dim < SHAPE.head_size)


@triton.jit(do_not_specialize=["layer", "table_stride"])
def prepare_units(
    query,
    query_stride,
    head_stride,
    cache,
    block_table,
    table_stride,
    query_rows,
    lengths,
    leases,
    layer,
    basis_keys,
    rotated,
    recent,
    records,
    extents,
    SHAPE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Rotate queries and write records. Grid: queries, KV heads and query heads together.

    Args:
        query: ``[queries, q_heads, head_size]``, strides of the first two in elements.
        cache: uint8 of the whole cache, 16-byte aligned.
        block_table: int32 ``[rows, blocks]``, stride of the first in elements.
        query_rows: int32 ``[queries]``.
        lengths: int32 ``[queries]``.
        leases: int32 ``[rows, max_leases, 2]``.
        layer: layer of the model.
        basis_keys: float32 ``[kv_heads, basis_rank, head_size]`` of the layer, if calibrated.
        rotated: written, float32 ``[queries, q_heads, rotated_width]``.
        recent: written where ``KEEP``, ``[queries, q_heads, head_size]`` in the queries' type: the
            queries as they are.
        records: written, see :func:`.addresses.write_record`.
        extents: written, same.
    """
    index = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    heads = SHAPE.num_kv_heads
    # Records first: they take longest.
    if number < heads:
        write_record(
            cache,
            block_table,
            table_stride,
            query_rows,
            lengths,
            leases,
            layer * heads + number,
            index,
            index * heads + number,
            records,
            extents,
            SHAPE,
        )
    else:
        rotate_query(
            query,
            query_stride,
            head_stride,
            cache,
            block_table,
            table_stride,
            query_rows,
            lengths,
            leases,
            layer,
            basis_keys,
            rotated,
            recent,
            index,
            number - heads,
            SHAPE,
            KEEP,
        )
