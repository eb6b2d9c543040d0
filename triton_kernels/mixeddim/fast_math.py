"""Single instructions of the GPU that Triton has no name for; numbers below 2**-126 become 0."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import INTERPRETED


@triton.jit
def exp2_flushed(x):
    """``2 ** x``, to some 22 bits; infinite from 128 on."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """``1 / x``, to some 23 bits; 0 of what is infinite."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def multiply_add_clamped(x, y, z):
    """``x * y + z``, within 0 and 1, of tensors that broadcast; ``z`` is a constant."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(x * y + z, 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [x, y, z],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def one_shifted(shift):
    """``1 << shift`` of int32; 0 where the shift, as a number without sign, is 32 or more."""
    if INTERPRETED:
        inside = (shift >= 0) & (shift < 32)
        return tl.where(inside, tl.full(shift.shape, 1, tl.int32) << (shift & 31), 0)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, 1, $1;", "=r,r", [shift], dtype=tl.int32, is_pure=True, pack=1
        )
