"""KV-Compress's choice of tokens (arXiv 2410.00161), and the same with HeadKV's head budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mdkv_vllm.artifacts.store import load_head_budgets
from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.eval.methods.block_eviction import evict_blocks, keep_best, squared_attention
from mdkv_vllm.eval.methods.eviction import WINDOW
from mdkv_vllm.models.held_cache import BLOCK_TOKENS, HeldCache, Prefill, evicted
from mdkv_vllm.models.in_process import InProcessModel

HEADKV_BUDGETS: dict[str, Any] = {"head_share": 1 / 1.1, "head_power": 1.0}
"""How HeadKV and MixedDimKV-H divide a budget: beta 1.1, scores as they are."""


@dataclass(frozen=True)
class KVCompress:
    """Squared attention of the last queries, summed over the group; whole blocks of any head.

    Attributes:
        name: how reports call it.
    """

    name: str = "kvcompress"
    fixed_shares: tuple[float, ...] = ()

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        num_blocks = int(budget * _all_blocks(prefill))
        return evicted(
            prefill, evict_blocks(_metric(model, prefill), WINDOW, BLOCK_TOKENS, num_blocks)
        )


@dataclass(frozen=True)
class HeadKV:
    """HeadKV's budget of each head, in whole blocks, filled by KV-Compress's metric.

    Attributes:
        name: how reports call it.
    """

    name: str = "headkv"
    fixed_shares: tuple[float, ...] = ()

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`.

        Raises:
            ValueError: the model has no head scores, or the budget is less than the window.
        """
        sizes = (model.num_layers, model.num_kv_heads)
        config = MixedDimConfig(**HEADKV_BUDGETS)
        heads = load_head_budgets(config, str(model.folder), sizes)
        assert heads is not None  # settings of head budgets without scores were refused
        blocks = -(-prefill.num_tokens // BLOCK_TOKENS)
        least = -(-WINDOW // BLOCK_TOKENS)
        total = int(budget * _all_blocks(prefill))
        if total < least * heads.scores.numel():
            raise ValueError(
                f"--budgets: {budget} of {prefill.num_tokens} tokens is less than the window of "
                f"{WINDOW} tokens, which {self.name} keeps of every head"
            )
        pages = heads.pages(total, least, blocks)
        kept = keep_best(_metric(model, prefill), WINDOW, pages * BLOCK_TOKENS)
        return evicted(prefill, kept)


def _all_blocks(prefill: Prefill) -> int:
    return prefill.keys[..., 0, 0].numel() * -(-prefill.num_tokens // BLOCK_TOKENS)


def _metric(model: InProcessModel, prefill: Prefill) -> torch.Tensor:
    queries = prefill.queries[:, :, -WINDOW:].float()
    return squared_attention(queries, prefill.keys.float(), model.scale)
