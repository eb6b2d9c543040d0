"""KV-Compress's choice of tokens (arXiv 2410.00161, sections 3.1 to 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from mdkv_vllm.core.eviction import evict_blocks, squared_attention
from mdkv_vllm.eval.cache import BLOCK_TOKENS, HeldCache, Prefill, evicted
from mdkv_vllm.eval.methods.eviction import WINDOW
from mdkv_vllm.eval.model import EvalModel


@dataclass(frozen=True)
class KVCompress:
    """Squared attention of the last queries, summed over the group; whole blocks of any head.

    Attributes:
        name: how reports call it.
    """

    name: str = "kvcompress"
    fixed_shares: tuple[float, ...] = ()

    def apply(self, model: EvalModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        metric = squared_attention(
            prefill.queries[:, :, -WINDOW:].float(), prefill.keys.float(), model.scale
        )
        heads = model.num_layers * model.num_kv_heads
        blocks = int(budget * prefill.num_tokens / BLOCK_TOKENS * heads)
        return evicted(prefill, evict_blocks(metric, WINDOW, BLOCK_TOKENS, blocks))
