"""Elements of pages: their types, and how float32 becomes one."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .softmax import INTERPRETED


def element_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a torch type."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def bfloat16_bits(x):
    """Nearest bfloat16 of float32, to even between two, as uint16 bits.

    The interpreter's own conversion cuts off.
    """
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)


@triton.jit
def float_of_bfloat16(bits):
    """float32 of a bfloat16's uint16 bits: a bfloat16 is the upper half of one."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_elements(page, at, x, mask, ELEMENT: tl.constexpr):
    """Store float32 as elements.

    Args:
        page: pointer to uint8.
        at: offsets in elements.
        ELEMENT: float32, float16 or bfloat16.
    """
    if ELEMENT == tl.bfloat16:
        tl.store(page.to(tl.pointer_type(tl.uint16)) + at, bfloat16_bits(x), mask=mask)
    else:
        tl.store(page.to(tl.pointer_type(ELEMENT)) + at, x.to(ELEMENT), mask=mask)
