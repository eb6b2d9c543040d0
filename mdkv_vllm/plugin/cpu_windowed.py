"""Layers with sliding windows on a CPU: vLLM's own attention, in blocks that may have been leases.

Their blocks are vLLM's own, at full size, and few: what lies before the window is given back.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_layout import KVCacheLayout


class WindowedCpuBackend(CPUAttentionBackend):
    """vLLM's CPU attention over the cache's layout and block sizes.

    Its kernel takes both, but vLLM declares only what it uses itself.
    """

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """Any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """That of the layers beside."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        """Its kernel does."""
        return True

    @staticmethod
    def get_impl_cls() -> type[WindowedCpuImpl]:
        """The layer's implementation."""
        return WindowedCpuImpl


class WindowedCpuImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys and values, ``[tokens, kv_heads, head_size]``.

        The kernel multiplies whole blocks before it masks, and bytes of a lease may be no numbers:
        a block is cleared when its first token comes.
        """
        block_size = kv_cache.shape[2]
        first = slot_mapping[slot_mapping % block_size == 0]
        kv_cache[first // block_size] = 0
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
