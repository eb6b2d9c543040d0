"""Prompts in a paged cache, made from plain tensors."""

import torch

from mdkv_vllm.core.prompt import PagedTokens


def paged(cache: torch.Tensor, block_size: int) -> PagedTokens:
    """A prompt's keys and values ``[layers, 2, kv_heads, tokens, head_size]`` in shuffled blocks.

    What lies behind the prompt in its last block, and other blocks, are NaN.
    """
    layers, _, heads, tokens, size = cache.shape
    needed = -(-tokens // block_size)
    shape = needed + 3, layers * heads, block_size, 2 * size
    kv_cache = torch.full(shape, torch.nan, dtype=cache.dtype, device=cache.device)
    blocks = torch.randperm(needed + 3)[:needed].to(cache.device)
    padded = torch.full((layers, 2, heads, needed * block_size, size), torch.nan).to(cache)
    padded[:, :, :, :tokens] = cache
    slots = padded.unflatten(3, (needed, block_size)).permute(3, 0, 2, 4, 1, 5)
    kv_cache[blocks] = slots.reshape(needed, *shape[1:])
    return PagedTokens(kv_cache, blocks.int(), tokens, heads)
