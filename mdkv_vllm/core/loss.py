"""Loss of holding a token at a format, as the window queries would see it.

Formulas: MixedDimKV (arXiv 2603.20616) section 3 and algorithm 1; probabilities of one token at a
time, pooling and the prior are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import max_pool1d, pad

from mdkv_vllm.core.losses import POOL_AFTER, POOL_BEFORE, Loss


@dataclass(frozen=True)
class Candidate:
    """Every span token of one layer as one format would hold it.

    Attributes:
        queries: window queries in the format's space, float32 ``[kv_heads, rows, rank]``.
        keys: keys as read back from the format, float32 ``[kv_heads, span, rank]``.
        value_error: Euclidean norm of the value's error, float32 ``[kv_heads, span]``.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    value_error: torch.Tensor


def window_logits(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores of the window queries over every key they may see.

    Args:
        queries: float32 ``[kv_heads, window, group, head_size]``, the prompt's last tokens.
        keys: float32 ``[kv_heads, tokens, head_size]``, the whole prompt.
        scale: factor of the scores.

    Returns:
        float32 ``[kv_heads, window * group, tokens]``, ``-inf`` above the diagonal.
    """
    _, window, group, _ = queries.shape
    logits = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2)).mul_(scale)
    if window > 1:
        hidden = torch.ones(window, window, dtype=torch.bool).triu_(1).repeat_interleave(group, 0)
        logits[:, :, -window:].masked_fill_(hidden, -torch.inf)
    return logits


def loss_sums(
    logits: torch.Tensor,
    candidates: Sequence[Candidate],
    span: int,
    scale: float,
    loss: Loss,
) -> torch.Tensor:
    """What the window queries say about each token, summed over them.

    Where it is joint, ``P_f`` is the softmax with every span key at format f. Otherwise only token
    t changes:
    ``P_f = P e / (1 + P (e - 1))`` with ``e`` the exponential of the score's change.

    Args:
        logits: from :func:`window_logits`, ``[kv_heads, rows, tokens]``; not kept.
        candidates: the reduced formats.
        span: tokens that are compressed.
        scale: factor of the scores.
        loss: which one.

    Returns:
        float32 ``[1 + candidates, kv_heads, span]``: ``sum_q P[q,t]``, then
        ``sum_q |P_f[q,t] - P[q,t]|`` of each candidate.
    """
    log_sum = logits.logsumexp(-1, keepdim=True)
    window_log_sum = logits[:, :, span:].logsumexp(-1, keepdim=True)
    probability = (logits[:, :, :span] - log_sum).exp_()
    sums = [probability.sum(1)]
    for candidate in candidates:
        scores = torch.bmm(candidate.queries, candidate.keys.transpose(1, 2)).mul_(scale)
        if loss.joint:
            total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), window_log_sum)
            changed = scores.sub_(total).exp_()
        else:
            # The bounds only guard against overflow, and against nothing over nothing.
            changed = scores.sub_(log_sum).clamp_(max=60).exp_()
            changed = changed.div_(changed + (1 - probability).clamp_(min=1e-30))
        sums.append(changed.sub_(probability).abs_().sum(1))
    return torch.stack(sums)


def losses_from_sums(
    sums: torch.Tensor,
    value_norms: torch.Tensor,
    value_errors: Sequence[torch.Tensor],
    loss: Loss,
    drop: bool,
) -> torch.Tensor:
    """Loss of every span token at ``drop`` (if allowed), each candidate, and nothing else.

    ``drop``:  ``sum_q 2 P[q,t] |V_t|``
    format f: ``sum_q |P_f[q,t] - P[q,t]| |V_t| + P[q,t] |V_t - V_t^f|``

    Args:
        sums: from :func:`loss_sums`.
        value_norms: float32 ``[kv_heads, span]``, ``|V_t|``.
        value_errors: float32 ``[kv_heads, span]`` per candidate, ``|V_t - V_t^f|``.
        loss: which one.
        drop: whether the first row of the result is ``drop``.

    Returns:
        float32 ``[options, kv_heads, span]``.
    """
    if loss.prior:
        sums = with_prior(sums, loss.prior)
    mass = sums[0]
    losses = [2 * mass * value_norms] if drop else []
    for moved, error in zip(sums[1:], value_errors, strict=True):
        losses.append(moved * value_norms + mass * error)
    return pool(torch.stack(losses), loss)


def with_prior(sums: torch.Tensor, prior: float) -> torch.Tensor:
    """Sums as though later queries looked at every token a little, besides the window's.

    A token the window ignores would otherwise be worth nothing, whatever is asked later. Its
    ``P`` grows by ``prior`` times its head's mean; ``|P_f - P|`` grows with it, for
    the relative change of ``P`` depends on the keys more than on who looks.

    Args:
        sums: from :func:`loss_sums`, ``[1 + candidates, kv_heads, span]``.
        prior: see :class:`mdkv_vllm.core.losses.Loss`.
    """
    mass = sums[0]
    raised = mass + prior * mass.mean(-1, keepdim=True)
    result = sums * (raised / mass.clamp_min(1e-30))
    result[0] = raised  # also where the window's own attention has underflowed
    return result


def token_losses(
    logits: torch.Tensor,
    value_norms: torch.Tensor,
    candidates: Sequence[Candidate],
    scale: float,
    loss: Loss,
    drop: bool,
) -> torch.Tensor:
    """:func:`loss_sums`, then :func:`losses_from_sums`."""
    sums = loss_sums(logits, candidates, value_norms.shape[1], scale, loss)
    return losses_from_sums(sums, value_norms, [c.value_error for c in candidates], loss, drop)


def pool(losses: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Spread losses over neighbouring tokens, where the loss pools.

    A token is rarely needed alone; without pooling, the later tokens of a phrase that the
    window queries do not look at yet are lost.

    Args:
        losses: float32 ``[options, kv_heads, span]``.
        loss: which one.
    """
    if not loss.pooled:
        return losses
    padded = pad(losses, (POOL_BEFORE, POOL_AFTER))  # losses are not negative
    pooled = max_pool1d(padded, POOL_BEFORE + 1 + POOL_AFTER, stride=1)
    return loss.pooled * pooled if not loss.own else loss.own * losses + loss.pooled * pooled
