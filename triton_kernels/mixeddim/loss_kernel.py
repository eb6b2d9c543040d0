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


@triton.jit(do_not_specialize=["span", "shares"])
def plain_losses(
    sums, norms, errors, masses, span, shares, SHAPE: tl.constexpr, TOKENS: tl.constexpr
):
    """Losses of a tile of tokens by themselves, written over what they are made of.

    Grid: token tiles, heads.

    Args:
        sums: see :func:`.token_sum_kernels.token_sums`; ``masses`` as well.
        norms: see :func:`.value_error_kernels.value_errors`; then losses of dropping.
        errors: see :func:`.value_error_kernels.value_errors`; then losses at the candidates.
        shares: of ``masses``, per head.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < span
    head = tl.program_id(1).to(tl.int64)
    plane = tl.num_programs(1).to(tl.int64) * span
    prior = 0.0
    if SHAPE.prior > 0:
        for share in tl.range(0, shares):
            prior += tl.load(masses + head * shares + share)
        prior = SHAPE.prior * prior / span
    sums += head * span + token
    norms += head * span + token
    errors += head * span + token
    mass = tl.load(sums, mask=exists, other=0.0)
    norm = tl.load(norms, mask=exists, other=0.0)
    raised = mass + prior
    CANDIDATES: tl.constexpr = SHAPE.num_candidates
    for candidate in tl.static_range(CANDIDATES):
        moved = tl.load(sums + (candidate + 1) * plane, mask=exists, other=0.0)
        error = tl.load(errors + candidate * plane, mask=exists, other=0.0)
        if SHAPE.prior > 0:
            moved = moved * (raised / tl.maximum(mass, 1e-30))
        tl.store(errors + candidate * plane, moved * norm + raised * error, mask=exists)
    tl.store(norms, 2 * raised * norm, mask=exists)


@triton.jit
def pooled_loss(plain, token, span, SHAPE: tl.constexpr):
    """Losses of some tokens, neighbours included.

    Args:
        plain: pointer to a row of :func:`plain_losses`.
    """
    loss = tl.zeros(token.shape, tl.float32)
    if SHAPE.own_weight > 0:
        loss += SHAPE.own_weight * tl.load(plain + token, mask=token < span, other=0.0)
    if SHAPE.pooled_weight > 0:
        most = tl.zeros(token.shape, tl.float32)  # losses are not negative
        for offset in tl.static_range(-BEFORE, AFTER + 1):
            near = token + offset
            exists = (near >= 0) & (near < span)
            other = tl.load(plain + near, mask=exists, other=0.0)
            most = tl.maximum(most, other)
        loss += SHAPE.pooled_weight * most
    return loss


@triton.jit(do_not_specialize=["span"])
def finish_losses(norms, errors, span, losses, SHAPE: tl.constexpr, TOKENS: tl.constexpr):
    """Losses of a tile of tokens at every option. Grid: token tiles, KV heads, layers.

    Args:
        norms: as :func:`plain_losses` left them; ``errors`` as well.
        losses: written, float32 ``[layers, options, kv_heads, span]``.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    heads = tl.num_programs(1).to(tl.int64)
    head = tl.program_id(2) * heads + tl.program_id(1)
    plane = heads * tl.num_programs(2) * span
    OPTIONS: tl.constexpr = SHAPE.num_options
    to = losses + (tl.program_id(2) * OPTIONS * heads + tl.program_id(1)) * span + token
    for option in tl.static_range(OPTIONS):
        if SHAPE.options[option] == AS_IT_IS:
            loss = tl.zeros([TOKENS], tl.float32)
        elif SHAPE.options[option] < 0:
            loss = pooled_loss(norms + head * span, token, span, SHAPE)
        else:
            of_candidate = errors + SHAPE.options[option] * plane + head * span
            loss = pooled_loss(of_candidate, token, span, SHAPE)
        tl.store(to + option * heads * span, loss, mask=token < span)
