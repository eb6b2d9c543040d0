"""A kernel around ``kth_largest``, for the interpreter's process."""

import torch
import triton
import triton.language as tl

from mdkv_vllm.kernels.triton.select_kernel import EXACT, float_of_ordered, kth_largest


@triton.jit
def numbers_of_rank(row, span, ranks, out, passes: tl.constexpr):
    """Grid: ranks. ``row`` float32 ``[span]``, ``ranks`` int64, ``out`` float32, written."""
    rank = tl.load(ranks + tl.program_id(0))
    tl.store(out + tl.program_id(0), float_of_ordered(kth_largest(row, span, rank, passes)))


def select(row, ranks, passes=EXACT.value):
    """The numbers of some ranks, 1 for the largest."""
    out = torch.empty(len(ranks))
    numbers_of_rank[(len(ranks),)](row, len(row), torch.tensor(ranks), out, passes=passes)
    return out
