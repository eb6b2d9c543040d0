"""Prefill attention over full pages, by torch's flash kernel and without masks."""

from __future__ import annotations

import torch

from mdkv_vllm.ops.cpu import load_kv


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    context_blocks: torch.Tensor,
    context_tokens: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Causal attention of one request's chunk to its context and itself.

    The chunk is attended to causally and the context in full, each by the flash kernel; the
    two are merged by their log-sum-exp, so that no mask is ever made. The chunk's
    own keys and values are first rounded to the cache's type: what a token sees must not
    depend on how its prompt was cut into chunks.

    Args:
        query: ``[chunk, query_heads, head_size]``.
        key: ``[chunk, kv_heads, head_size]``.
        value: ``[chunk, kv_heads, head_size]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` view of the layer.
        context_blocks: int32 block ids that hold the context.
        context_tokens: tokens before the chunk.
        scale: factor of the scores.
        output: ``[chunk, query_heads, head_size]``, written in place.
    """
    heads = key.shape[1]
    grouped = query.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
    key, value = (x.to(kv_cache.dtype).to(query.dtype).transpose(0, 1) for x in (key, value))
    attended, log_sum = _flash(grouped, key, value, scale, causal=True)
    if context_tokens:
        shape = (heads, context_tokens, key.shape[-1])
        context = (query.new_empty(shape), query.new_empty(shape))
        load_kv(kv_cache, context_blocks, context_tokens, *context)
        earlier, earlier_log_sum = _flash(grouped, *context, scale, causal=False)
        share = torch.sigmoid(earlier_log_sum - log_sum).unsqueeze(-1).to(query.dtype)
        attended = torch.lerp(attended, earlier, share)
    output.unflatten(1, (heads, -1)).copy_(attended.permute(2, 0, 1, 3))


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention of ``[kv_heads, group, chunk, head_size]`` queries.

    Keys and values ``[kv_heads, tokens, head_size]`` are shared by the group without a copy.

    Returns:
        Output like ``query`` and float32 log-sum-exp ``[kv_heads, group, chunk]``.
    """
    group = query.shape[1]
    expanded = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (keys, values))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, *expanded, 0.0, causal, scale=scale
    )
