"""Losses from what queries make of tokens: :func:`mdkv_vllm.core.loss.losses_from_sums`."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from mdkv_vllm.core import losses as specification

BEFORE = tl.constexpr(specification.POOL_BEFORE)
AFTER = tl.constexpr(specification.POOL_AFTER)
AS_IT_IS = tl.constexpr(-2)


@triton.jit
def plain_loss(
    sums, norms, errors, plane, token, exists, prior, OPTION: tl.constexpr, SHAPE: tl.constexpr
):
    """Losses of some tokens by themselves, 0 where there is none.

    Args:
        sums: of the head, see :func:`.window_kernels.token_sums`; ``norms``, ``errors`` likewise.
        plane: elements from candidate to candidate.
        prior: what is added to every token's mass.
        OPTION: which of ``SHAPE.options``.
    """
    NUMBER: tl.constexpr = SHAPE.options[OPTION]
    mass = tl.load(sums + token, mask=exists, other=0.0)
    norm = tl.load(norms + token, mask=exists, other=0.0)
    raised = mass + prior
    if NUMBER < 0:
        loss = 2 * raised * norm
    else:
        moved = tl.load(sums + (NUMBER + 1) * plane + token, mask=exists, other=0.0)
        error = tl.load(errors + NUMBER * plane + token, mask=exists, other=0.0)
        if SHAPE.prior > 0:
            moved = moved * (raised / tl.maximum(mass, 1e-30))
        loss = moved * norm + raised * error
    return tl.where(exists, loss, 0.0)


@triton.jit
def loss_of(
    sums, norms, errors, plane, token, span, prior, OPTION: tl.constexpr, SHAPE: tl.constexpr
):
    """Losses of some tokens at an option, neighbours included; see :func:`plain_loss`."""
    loss = tl.zeros(token.shape, tl.float32)
    if SHAPE.own_weight > 0:
        exists = token < span
        own = plain_loss(sums, norms, errors, plane, token, exists, prior, OPTION, SHAPE)
        loss += SHAPE.own_weight * own
    if SHAPE.pooled_weight > 0:
        most = tl.zeros(token.shape, tl.float32)  # losses are not negative
        for offset in tl.range(-BEFORE, AFTER + 1):
            near = token + offset
            exists = (near >= 0) & (near < span)
            other = plain_loss(sums, norms, errors, plane, near, exists, prior, OPTION, SHAPE)
            most = tl.maximum(most, other)
        loss += SHAPE.pooled_weight * most
    return loss


@triton.jit(do_not_specialize=["span", "shares"])
def finish_losses(
    sums, norms, errors, masses, span, shares, losses, SHAPE: tl.constexpr, TOKENS: tl.constexpr
):
    """Losses of a tile of tokens at every option. Grid: token tiles, KV heads, layers.

    Args:
        sums: see :func:`.window_kernels.token_sums`; ``masses`` as well.
        norms: see :func:`.window_kernels.value_errors`; ``errors`` as well.
        shares: of ``masses``, per head.
        losses: written, float32 ``[layers, options, kv_heads, span]``.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    plane = tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * span
    prior = 0.0
    if SHAPE.prior > 0:
        for share in tl.range(0, shares):
            prior += tl.load(masses + head * shares + share)
        prior = SHAPE.prior * prior / span
    sums += head * span
    norms += head * span
    errors += head * span
    to = (
        losses
        + (
            tl.program_id(2).to(tl.int64) * SHAPE.num_options * tl.num_programs(1)
            + tl.program_id(1)
        )
        * span
    )
    OPTIONS: tl.constexpr = SHAPE.num_options
    for option in tl.static_range(OPTIONS):
        row = to + option * tl.num_programs(1).to(tl.int64) * span
        if SHAPE.options[option] == AS_IT_IS:
            loss = tl.zeros([TOKENS], tl.float32)
        else:
            loss = loss_of(sums, norms, errors, plane, token, span, prior, option, SHAPE)
        tl.store(row + token, loss, mask=token < span)
