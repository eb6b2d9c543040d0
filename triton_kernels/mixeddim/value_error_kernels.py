"""Norms of values, and what every format loses of them.

Every program works for one layer and head, told by its last index; a group of layers is one grid.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .elements import float_of_bfloat16
from .paged import key_offsets, load_rows, matrix_of, rotated_rows
from .quantize import quantize_rows, row_products
from .window_scores import code_errors, keep_scales, page_of, whole_rotated


@triton.jit
def value_lost(
    rows, cache, offsets, exists, square, basis, head, NUMBER: tl.constexpr, SHAPE: tl.constexpr
):
    """Squared errors of values as a format would hold them, and its codes' scales: ``[tokens]``.

    Args:
        rows: see :func:`whole_rotated`.
        square: squared norms of the values, ``[tokens]``.
        basis: see :func:`.paged.matrix_of`, of values.
        head: of a layer.
        NUMBER: which of ``SHAPE.candidates``.
    """
    FORMAT: tl.constexpr = SHAPE.candidates[NUMBER]
    SPACE: tl.constexpr = FORMAT.space
    if FORMAT.in_hadamard:
        off, step = code_errors(rows, NUMBER, SHAPE)
        lost = row_products(off, off) * step * step
    else:
        dim = tl.arange(0, FORMAT.padded_rank)
        wanted = dim < FORMAT.rank
        matrix = matrix_of(basis, basis, head, SPACE)
        kept = rotated_rows(cache, offsets, exists, matrix, dim, wanted, SPACE)
        # Orthonormal columns: what the projection loses is what it does not hold.
        lost = tl.maximum(square - tl.sum(kept * kept, axis=1), 0.0)
        step = tl.full([offsets.shape[0]], 1.0, tl.float32)
        if FORMAT.quantized:
            codes, bits = quantize_rows(
                kept, wanted[None, :], SPACE.norm, FORMAT.rank, FORMAT.bits, FORMAT.step
            )
            step = float_of_bfloat16(bits)
            off = kept - (codes - FORMAT.zero) * step[:, None]
            off = tl.where(wanted[None, :], off, 0.0)
            lost += tl.sum(off * off, axis=1)
    return lost, step


@triton.jit(do_not_specialize=["first_layer", "span"])
def value_errors(
    cache, blocks, hadamard, basis, first_layer, span, norms, errors, code_scales,
    SHAPE: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Norms of values, and of what each format loses of them. Grid: shares, heads.

    Args:
        hadamard: see :func:`matrix_of`; ``basis`` as well, of values.
        norms: written, float32 ``[heads, span]``.
        errors: written, float32 ``[candidates, heads, span]``.
        code_scales: see :func:`token_sums`; those of values are written.
    """
    CANDIDATES: tl.constexpr = SHAPE.num_candidates
    share = tl.program_id(0)
    head = tl.program_id(1)
    page = page_of(first_layer, head, SHAPE)
    plane = tl.num_programs(1).to(tl.int64) * span
    norms += head.to(tl.int64) * span
    errors += head.to(tl.int64) * span
    code_scales += head.to(tl.int64) * span
    cache += SHAPE.dims
    for first in tl.range(share * SHARE, tl.minimum((share + 1) * SHARE, span), TOKENS):
        token = first + tl.arange(0, TOKENS)
        exists = token < span
        offsets = key_offsets(blocks, page, token, exists, SHAPE)
        rows = whole_rotated(cache, offsets, exists, hadamard, SHAPE)
        if SHAPE.uses_hadamard:
            square = row_products(rows, rows) * (SHAPE.hadamard.norm * SHAPE.hadamard.norm)
        else:
            values = load_rows(cache, offsets, exists, 0, SHAPE.dims, SHAPE.padded_dims)
            values = values.to(tl.float32)
            square = tl.sum(values * values, axis=1)
        tl.store(norms + token, tl.sqrt(square), mask=exists)
        for candidate in tl.static_range(CANDIDATES):
            lost, step = value_lost(
                rows, cache, offsets, exists, square, basis, head, candidate, SHAPE
            )
            tl.store(errors + candidate * plane + token, tl.sqrt(lost), mask=exists)
            keep_scales(code_scales, plane, token, exists, step, candidate, 1, SHAPE)
