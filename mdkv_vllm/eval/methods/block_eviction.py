"""KV-Compress's metric and schedule: eviction in whole blocks across heads and layers.

Source: KV-Compress, arXiv 2410.00161, sections 3.1 (metric) and 3.3 with algorithm 1
(schedule). Eviction only: a token stays whole or goes.
"""

from __future__ import annotations

import torch

from mdkv_vllm.core.loss import window_logits


def squared_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """How much the last queries look at each token: ``sum_q P[q, t]^2`` over the whole group.

    Args:
        queries: float32 ``[layers, query_heads, window, head_size]``, the prompt's last.
        keys: float32 ``[layers, kv_heads, tokens, head_size]``.
        scale: factor of the scores.

    Returns:
        float32 ``[layers, kv_heads, tokens]``.
    """
    metrics = []
    for layer_queries, layer_keys in zip(queries, keys, strict=True):
        grouped = layer_queries.unflatten(0, (layer_keys.shape[0], -1)).transpose(1, 2)
        logits = window_logits(grouped.contiguous(), layer_keys, scale)
        metrics.append(logits.softmax(-1).square_().sum(1))
    return torch.stack(metrics)


def evict_blocks(
    metric: torch.Tensor, window: int, block_tokens: int, num_blocks: int
) -> torch.Tensor:
    """Choose the tokens to keep so that all heads together hold ``num_blocks`` blocks.

    A head gives up its cheapest tokens; what freeing its next block costs is the metric of the
    last token that must go for it. The first one needs only the tokens in the head's last,
    partly filled block to go. Blocks are freed in the order of that cost, whichever head
    they belong to.

    Args:
        metric: ``[layers, kv_heads, tokens]``.
        window: last tokens that always stay.
        block_tokens: tokens of one block.
        num_blocks: blocks to hold in the end.

    Returns:
        bool ``[layers, kv_heads, tokens]``.

    Raises:
        ValueError: the windows alone take more blocks.
    """
    tokens = metric.shape[-1]
    flat = metric.flatten(0, 1)
    blocks = -(-tokens // block_tokens)
    to_free = flat.shape[0] * blocks - num_blocks
    cost, order = flat[:, : tokens - window].sort(dim=-1)
    hanging = tokens - (blocks - 1) * block_tokens
    steps = cost[:, hanging - 1 :: block_tokens]
    if to_free > steps.numel():
        least = flat.shape[0] * blocks - steps.numel()
        raise ValueError(f"{num_blocks} blocks cannot hold the window; it takes {least}")
    kept = torch.ones_like(flat, dtype=torch.bool)
    if to_free > 0:
        # Costs rise along a head, so the cheapest steps of all are a prefix of each head's.
        freed = torch.zeros(steps.numel(), dtype=torch.bool)
        freed[steps.flatten().argsort(stable=True)[:to_free]] = True
        counts = freed.view_as(steps).sum(-1)
        evicted = torch.where(counts > 0, hanging + (counts - 1) * block_tokens, 0)
        goes = torch.arange(cost.shape[1]) < evicted.unsqueeze(1)
        kept.scatter_(1, order, ~goes)
    return kept.view_as(metric)


def keep_best(metric: torch.Tensor, window: int, counts: torch.Tensor) -> torch.Tensor:
    """Keep every head's own number of tokens, as HeadKV does (arXiv 2410.19258).

    Args:
        metric: ``[layers, kv_heads, tokens]``.
        window: last tokens that always stay, among those counted.
        counts: tokens to keep, int64 ``[layers, kv_heads]``, from ``window`` to all.

    Returns:
        bool ``[layers, kv_heads, tokens]``.
    """
    metric = metric.clone()
    metric[..., metric.shape[-1] - window :] = torch.inf
    places = metric.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return places < counts.unsqueeze(-1)
