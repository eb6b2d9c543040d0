"""Full-dimension tokens in and out of the cache, in C++."""

from __future__ import annotations

import torch

import mdkv_vllm.kernels.cpu  # noqa: F401  (registers the operators)


def store_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write full-dimension tokens into one layer's view of the cache.

    Args:
        key: ``[tokens, kv_heads, head_size]``, last dimension contiguous.
        value: same shape and type.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, keys first; any strides
            but a contiguous last dimension. Rounded to nearest even where its type is narrower.
        slot_mapping: int64 ``[tokens or more]``, ``block * block_size + offset``; a negative
            slot skips its token.
    """
    torch.ops.mdkv.store_kv.default(key, value, kv_cache, slot_mapping)


def load_kv(
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    num_tokens: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Gather the first tokens of some blocks of one layer.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        block_ids: int32 or int64 ``[n]``, in token order.
        num_tokens: tokens to read.
        keys: written, ``[kv_heads, num_tokens, head_size]``; any float type.
        values: written, same shape.
    """
    torch.ops.mdkv.load_kv.default(kv_cache, block_ids, num_tokens, keys, values)
