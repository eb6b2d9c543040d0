"""What the window queries say about each token, without writing out a matrix of scores.

Formulas: :func:`mdkv_vllm.core.loss.loss_sums`. A softmax normalises rows (queries) while the sums
run down columns (tokens), so there are two passes over the keys, as in FlashAttention's
backward pass (arXiv 2307.08691):

1. ``row_log_sums``: each program takes a share of the tokens and keeps one online softmax per
   query. The shares' log-sum-exps are merged by torch, some kilobytes a head.
2. ``token_sums``: each program takes a tile of tokens, makes their scores again, and
   sums over all queries.

Rows of a tile are the queries of a KV head, window and group together.

Cost of H heads, R rows, N tokens of D dimensions and F candidates of the same size: products of
``2 H R N D`` operations, ``1 + 2 F`` times (``1 + 3 F`` in ``paper``); and as many reads of
a layer's keys, of which a second pass over the same ones mostly finds the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from mdkv_vllm.core.loss import Candidate

from .elements import element_type
from .shapes import padded
from .window_kernels import LOG2_E, row_log_sums, token_sums

TOKENS_PER_PROGRAM = 512
"""Tokens of a share in the first pass: even a prompt of 4K at 8 heads fills some 64 programs."""

MAX_TILE_ROWS, TILE_TOKENS = 64, 64

CHUNK_BYTES = 64
"""Bytes of a row loaded at a time: more would not fit the registers of a float32 product."""

NUM_WARPS = 8


def chunk_of(rank: int, dtype: torch.dtype) -> int:
    """Dimensions taken at a time: as many as :data:`CHUNK_BYTES` hold, if there are."""
    return min(padded(max(rank, 1)), CHUNK_BYTES // dtype.itemsize)


def _log_sums(
    queries: torch.Tensor,
    keys: torch.Tensor,
    first_token: int,
    first_query: int,
    group: int,
    scale: float,
) -> torch.Tensor:
    """float32 ``[heads, rows]``: log-sum-exp over the keys from ``first_token`` on."""
    heads, rows, rank = queries.shape
    tokens = keys.shape[1]
    shares = max(1, triton.cdiv(tokens - first_token, TOKENS_PER_PROGRAM))
    tile_rows = min(padded(rows), MAX_TILE_ROWS)
    kind = torch.promote_types(queries.dtype, keys.dtype)
    out = torch.empty(heads, shares, rows, dtype=torch.float32, device=queries.device)
    row_log_sums[(shares, triton.cdiv(rows, tile_rows), heads)](
        queries,
        *queries.stride()[:2],
        keys,
        *keys.stride()[:2],
        first_token,
        tokens,
        rows,
        first_query,
        scale * LOG2_E.value,
        out,
        GROUP=group,
        DIMS=rank,
        CHUNK=chunk_of(rank, kind),
        TYPE=element_type(kind),
        ROWS=tile_rows,
        TOKENS=TILE_TOKENS,
        SHARE=TOKENS_PER_PROGRAM,
        num_warps=NUM_WARPS,
    )
    return out.logsumexp(1)


def loss_sums(
    queries: torch.Tensor,
    keys: torch.Tensor,
    candidates: Sequence[Candidate],
    span: int,
    scale: float,
    variant: str,
) -> torch.Tensor:
    """See :meth:`mdkv_vllm.core.kernels.CompressionKernels.loss_sums`; any float type.

    Products are made in the type that the queries and keys share, sums in float32. Nothing waits
    for the device.

    Args:
        queries: ``[kv_heads, window, group, head_size]``, the prompt's last tokens.
        keys: ``[kv_heads, tokens, head_size]``, the whole prompt, innermost contiguous.
        candidates: the reduced formats; their queries and keys may have another type.
        span: tokens that are compressed, at most those before the window.
        scale: factor of the scores.
        variant: one of :data:`mdkv_vllm.core.loss.LOSSES`.

    Returns:
        float32 ``[1 + candidates, kv_heads, span]``.
    """
    heads, window, group, _ = queries.shape
    first_query = keys.shape[1] - window
    assert 0 < span <= first_query, "the window is not compressed"
    rows = queries.flatten(1, 2)
    span_keys = keys[:, :span]
    rest = _log_sums(rows, keys, span, first_query, group, scale)
    log_sums = torch.logaddexp(_log_sums(rows, span_keys, 0, first_query, group, scale), rest)
    together = variant == "paper"
    sums = torch.empty(1 + len(candidates), heads, span, dtype=torch.float32, device=queries.device)
    # Without candidates, one launch for the mass alone.
    for index, candidate in enumerate(candidates or [None], 1):
        other_log_sums = log_sums
        if candidate is not None and together:
            own = _log_sums(candidate.queries, candidate.keys, 0, first_query, group, scale)
            other_log_sums = torch.logaddexp(own, rest)
        _token_sums(
            (rows, span_keys, log_sums),
            candidate,
            other_log_sums,
            scale,
            sums[0],
            sums[min(index, len(candidates))],
            together,
        )
    return sums


def _token_sums(
    exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    candidate: Candidate | None,
    other_log_sums: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
    moved: torch.Tensor,
    together: bool,
) -> None:
    """Launch ``token_sums``; without a candidate, ``moved`` is left."""
    rows, keys, log_sums = exact
    other_rows, other_keys, other_rank = rows, keys, 0
    if candidate is not None:
        other_rows, other_keys = candidate.queries, candidate.keys
        other_rank = other_keys.shape[2]
    heads, count, rank = rows.shape
    span = keys.shape[1]
    tile_rows = min(padded(count), MAX_TILE_ROWS)
    kind = torch.promote_types(rows.dtype, keys.dtype)
    other_kind = torch.promote_types(other_rows.dtype, other_keys.dtype)
    token_sums[(triton.cdiv(span, TILE_TOKENS), heads)](
        rows,
        *rows.stride()[:2],
        keys,
        *keys.stride()[:2],
        log_sums,
        other_rows,
        *other_rows.stride()[:2],
        other_keys,
        *other_keys.stride()[:2],
        other_log_sums,
        span,
        count,
        scale * LOG2_E.value,
        mass,
        moved,
        DIMS=rank,
        CHUNK=chunk_of(rank, kind),
        TYPE=element_type(kind),
        OTHER_DIMS=other_rank,
        OTHER_CHUNK=chunk_of(other_rank, other_kind),
        OTHER_TYPE=element_type(other_kind),
        ROWS=tile_rows,
        TOKENS=TILE_TOKENS,
        TOGETHER=together,
        num_warps=NUM_WARPS,
    )
