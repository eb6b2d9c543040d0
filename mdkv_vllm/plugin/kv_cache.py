"""The whole cache as one tensor, and full-dimension tokens in and out of it."""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as vllm_ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, UniformTypeKVCacheSpecs

from mdkv_vllm.config import ConfigError
from mdkv_vllm.plugin.compat import cache_scales
from mdkv_vllm.plugin.registration import BACKEND_NAME
from mdkv_vllm.policy import Policy


def layer_specs(group: KVCacheGroupSpec) -> list[KVCacheSpec]:
    """Specs of a group's layers; where these differ, vLLM wraps them."""
    if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
        return list(group.kv_cache_spec.kv_cache_specs.values())
    return [group.kv_cache_spec] * len(group.layer_names)


def every_layer(vllm_config: VllmConfig) -> list[Attention]:
    """The model's attention layers, those with sliding windows included."""
    context = vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, Attention)]


def attention_layers(vllm_config: VllmConfig) -> list[Attention]:
    """The layers whose blocks may be leases, in the order of their place in the cache."""
    layers = every_layer(vllm_config)
    ours = [layer for layer in layers if layer.attn_backend.get_name() == BACKEND_NAME]
    return sorted(ours, key=lambda layer: layer.kv_cache.data_ptr())


def sinks_of(layers: list[Attention]) -> list[torch.Tensor] | None:
    """Attention sinks, of each layer ``[query_heads]``; None where there are none."""
    if not layers[0].has_sink:
        return None
    return [layer.impl.sinks.detach() for layer in layers]


def kv_cache_of(views: list[torch.Tensor], policy: Policy) -> torch.Tensor:
    """The whole cache as one tensor over its layers' views.

    Args:
        views: per layer ``[blocks, kv_heads, block_size, 2 * head_size]``, in memory order.
        policy: the settings applied to the model.

    Returns:
        ``[blocks, layers * kv_heads, block_size, 2 * head_size]``, contiguous.

    Raises:
        ConfigError: the views do not lie block by block, all layers side by side.
    """
    pages, size = policy.layout.pages_per_block, policy.geometry
    content = 2 * size.head_size
    stride = (pages * size.block_size * content, size.block_size * content, content, 1)
    first = views[0]
    expected = [
        first.storage_offset() + i * policy.num_kv_heads * stride[1] for i in range(len(views))
    ]
    if (
        len(views) != policy.num_layers
        or first.stride(0) != stride[0]
        or [view.storage_offset() for view in views] != expected
    ):
        raise ConfigError(
            "--attention-backend mixeddim needs the KV cache layout BLHNC (all layers of a block "
            "side by side); unset VLLM_KV_CACHE_LAYOUT"
        )
    shape = (first.shape[0], pages, size.block_size, content)
    return first.as_strided(shape, stride, first.storage_offset())


def store_tokens(
    layer: Any,  # noqa: ANN401
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
) -> None:
    """Write new tokens at full dimension into one layer's view of the cache.

    Args:
        layer: vLLM's layer, whose scales its own kernel wants.
        key: ``[tokens, kv_heads, head_size]``.
        value: same shape.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        slot_mapping: int64 ``[tokens or fewer]``; a negative slot skips its token.
        kv_cache_dtype: vLLM's name of the cache's type.
    """
    if kv_cache.device.type == "cpu":
        from mdkv_vllm.kernels.cpu.cache import store_kv

        store_kv(key, value, kv_cache, slot_mapping)
        return
    keys, values = kv_cache.transpose(1, 2).split(key.shape[-1], dim=-1)
    vllm_ops.reshape_and_cache_flash(
        key, value, keys, values, slot_mapping, kv_cache_dtype, *cache_scales(layer)
    )


def load_tokens(
    kv_cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a request's first tokens, ``[kv_heads, num_tokens, head_size]``.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` view of one layer.
        blocks: int32 ``[n]``, the request's blocks in token order, or more.
        num_tokens: tokens to read.
        dtype: of the result.
    """
    heads, block_size, content = kv_cache.shape[1:]
    blocks = blocks[: -(-num_tokens // block_size)]
    if kv_cache.device.type == "cpu":
        from mdkv_vllm.kernels.cpu.cache import load_kv

        keys, values = torch.empty(2, heads, num_tokens, content // 2, dtype=dtype)
        load_kv(kv_cache, blocks, num_tokens, keys, values)
        return keys, values
    tokens = kv_cache.index_select(0, blocks).transpose(0, 1).flatten(1, 2)[:, :num_tokens]
    keys, values = tokens.to(dtype).split(content // 2, dim=-1)
    return keys, values
