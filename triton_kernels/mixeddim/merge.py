"""The merge kernel: sums parts by their log-sum-exp and brings the sums back to the model's space.

Parts are in the space of their list. Each space is summed apart and rotated back once.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import FIRST_BLOCK, ROW, TAIL_BLOCK, record_of
from .rotate import hadamard, load_basis


@triton.jit
def sum_parts(
    out,
    lse,
    top,
    PART: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    SHAPE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weigh and sum one list's parts of all splits.

    Args:
        out: pointer to the query head's row in the unit's first slot.
        lse: pointer to the query head's row of the unit's first split.
        top: the largest base-2 logarithm of all parts of the query head.
        PART: index of the list in ``SHAPE.parts``.
        PADDED_RANK: dimensions of the result.
        ROWS: splits at a time.

    Returns:
        float32 ``[PADDED_RANK]``, and the sum of weights.
    """
    dim = tl.arange(0, PADDED_RANK)
    total = tl.zeros([PADDED_RANK], tl.float32)
    sum_of_weights = 0.0
    for first in range(0, SPLITS, ROWS):
        split = first + tl.arange(0, ROWS)
        part = tl.load(lse + split * (SHAPE.group * SHAPE.num_parts) + PART)
        weight = tl.exp2(part - top)
        # Parts that do not exist were not written either.
        values = tl.load(
            out + (split + PART)[:, None] * SHAPE.part_floats + dim[None, :],
            mask=(part > float("-inf"))[:, None] & (dim < SHAPE.parts[PART].rank)[None, :],
            other=0,
        )
        total += tl.sum(weight[:, None] * values, axis=0)
        sum_of_weights += tl.sum(weight, axis=0)
    return total, sum_of_weights


@triton.jit(do_not_specialize=["layer", "table_stride"])
def merge_parts(
    part_out,
    part_lse,
    cache,
    block_table,
    table_stride,
    records,
    layer,
    basis_values,
    output,
    output_stride,
    output_head_stride,
    lse,
    SHAPE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Merge the parts of ``attend_split``. Grid: query heads, queries.

    Args:
        records: from ``prepare_units``.
        output: written, ``[queries, q_heads, head_size]``; zeros where a query sees nothing.
        lse: written if ``HAS_LSE``, float32 ``[queries, q_heads]``, natural logarithm.
    """
    LISTS: tl.constexpr = SHAPE.num_lists
    query_head = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    head = query_head // SHAPE.group
    unit = index * SHAPE.num_kv_heads + head
    in_group = query_head % SHAPE.group
    out = part_out + unit * ((SPLITS + SHAPE.num_lists) * SHAPE.part_floats)
    out += in_group * SHAPE.head_size
    parts = part_lse + (unit * SPLITS * SHAPE.group + in_group) * SHAPE.num_parts
    dim = tl.arange(0, SHAPE.padded_head)

    DIMS: tl.constexpr = SHAPE.padded_head
    BASIS: tl.constexpr = SHAPE.padded_basis
    every_split = tl.arange(0, SPLITS)[:, None] * (SHAPE.group * SHAPE.num_parts)
    every_list = tl.arange(0, SHAPE.padded_parts)[None, :]
    every_part = tl.load(
        parts + every_split + every_list, mask=every_list < SHAPE.num_parts, other=float("-inf")
    )
    top = tl.maximum(tl.max(tl.max(every_part, axis=1), axis=0), -1e30)

    plain, weights = sum_parts(
        out,
        parts,
        top,
        LISTS,
        DIMS,
        SHAPE,
        SPLITS,
        ROWS,
    )
    low = tl.zeros([BASIS], tl.float32)
    turned = tl.zeros([DIMS], tl.float32)
    for f in tl.static_range(LISTS):
        total, weight = sum_parts(
            out,
            parts,
            top,
            f,
            BASIS if SHAPE.parts[f].in_basis else DIMS,
            SHAPE,
            SPLITS,
            ROWS,
        )
        weights += weight
        if SHAPE.parts[f].in_basis:
            low += total
        elif SHAPE.parts[f].in_hadamard:
            turned += total
        else:
            plain += total
    if SHAPE.uses_hadamard:
        plain += hadamard(turned, SHAPE)
    if SHAPE.uses_basis:
        record = record_of(records, unit, SHAPE)
        row = tl.load(record + ROW).to(tl.int64)
        basis = load_basis(
            basis_values,
            cache,
            block_table + row * table_stride,
            tl.load(record + FIRST_BLOCK),
            tl.load(record + TAIL_BLOCK),
            layer,
            head,
            1,
            SHAPE,
        )
        plain += tl.sum(low[:, None] * basis, axis=0)
    # A query that sees nothing has no weight and gets zeros.
    plain = plain / tl.where(weights == 0, 1.0, weights)
    to = output + index * output_stride + query_head * output_head_stride
    tl.store(to + dim, plain.to(output.dtype.element_ty), mask=dim < SHAPE.head_size)
    if HAS_LSE:
        natural = (top + tl.log2(weights)) * 0.6931471805599453
        tl.store(lse + index * tl.num_programs(0) + query_head, natural)
