"""The two products and the online softmax that every page format and the tail share.

The state of some rows (query heads) is their maximum, their weights, and their weighted values.
Scores are base-2 logarithms. Weights are kept per column and summed once at the end, so that
a tile costs one reduction over tokens, not two.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which knows no inline assembly and multiplies no
bfloat16."""

LOWEST = tl.constexpr(-1e30)
"""The maximum before the first tile. Finite, so that a tile without any token leaves the state
as it is instead of making it NaN."""


@triton.jit
def dot(left, right, add):
    """``left @ right + add`` in float32, exact products whatever the operands' type."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, add, input_precision="ieee")


@triton.jit
def raise_maximum(maximum, scores):
    """The maximum after a tile, and the factor for what was summed against the earlier one.

    Args:
        maximum: float32 ``[rows]``.
        scores: float32 ``[rows, tokens]``, minus infinity where there is no token.

    Returns:
        float32 ``[rows]``, and ``[rows, 1]``.
    """
    raised = tl.maximum(maximum, tl.max(scores, axis=1))
    return raised, tl.exp2(maximum - raised)[:, None]


@triton.jit
def absorb(maximum, weights, values, scores, exists, rows):
    """The state after a tile whose values are plain elements.

    Args:
        maximum: float32 ``[rows]``.
        weights: float32 ``[rows, tokens]``.
        values: float32 ``[rows, padded_rank]``.
        scores: float32 ``[rows, tokens]``.
        exists: which tokens there are, ``[tokens]``.
        rows: values of the tile, ``[tokens, padded_rank]``, in the type they are multiplied in.
    """
    scores = tl.where(exists[None, :], scores, float("-inf"))
    maximum, factor = raise_maximum(maximum, scores)
    weight = tl.exp2(scores - maximum[:, None])
    return maximum, weights * factor + weight, dot(weight.to(rows.dtype), rows, values * factor)
