"""The two ends: everything, and nothing but the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.models.held_cache import BLOCK_TOKENS, HeldCache, Prefill, evicted, full_cache
from mdkv_vllm.models.in_process import InProcessModel


@dataclass(frozen=True)
class Full:
    """The whole cache."""

    name: str = "full"
    fixed_shares: tuple[float, ...] = (1.0,)

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        return full_cache(prefill)


@dataclass(frozen=True)
class Recent:
    """The last tokens only: the floor."""

    name: str = "recent"
    fixed_shares: tuple[float, ...] = ()

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        count = int(budget * prefill.num_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        kept = torch.zeros(prefill.keys.shape[:3], dtype=torch.bool)
        kept[..., prefill.num_tokens - count :] = True
        return evicted(prefill, kept)
