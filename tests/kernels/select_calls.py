"""A kernel around ``kth_largest``, for the interpreter's process."""

import torch
import triton
import triton.language as tl

from mdkv_vllm.kernels.triton.select_kernel import (
    EXACT,
    TILE,
    float_of_ordered,
    kth_largest,
    store_gains,
    whole_tiles,
)


@triton.jit
def numbers_of_rank(row, span, length, ranks, gains, out, passes: tl.constexpr):
    """One program. ``row`` float32 ``[span]``, ``ranks`` int64, ``out`` float32, written."""
    for first in tl.range(0, length, TILE):
        token = first + tl.arange(0, TILE)
        store_gains(gains, token, tl.load(row + token, mask=token < span, other=0.0), span)
    number = tl.program_id(0)
    rank = tl.load(ranks + number)
    tl.store(out + number, float_of_ordered(kth_largest(gains, length, rank, passes)))


def select(row, ranks, passes=EXACT.value):
    """The numbers of some ranks, 1 for the largest."""
    out, length = torch.empty(len(ranks)), whole_tiles(len(row))
    gains = torch.empty(length, dtype=torch.int32)
    numbers_of_rank[(len(ranks),)](
        row, len(row), length, torch.tensor(ranks), gains, out, passes=passes
    )
    return out
