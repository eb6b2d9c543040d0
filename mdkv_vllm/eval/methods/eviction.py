"""Peers that keep tokens whole or not at all, from NVIDIA's kvpress, and its channel pruning.

kvpress chooses what to keep, layer by layer, from the inputs of each attention module; we count
what a paged server would hold of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from mdkv_vllm.models.held_cache import BLOCK_TOKENS, HeldCache, Prefill, evicted, full_cache
from mdkv_vllm.models.in_process import InProcessModel

WINDOW = 32
"""Observation window of every method that has one (MixedDimKV's alpha); ours has a setting."""


def require_kvpress() -> None:
    """Check that the package is there that knows how the peers choose.

    Raises:
        ValueError: it is not; the message says how to get it.
    """
    if find_spec("kvpress") is None:
        raise ValueError(
            "the methods to compare with need kvpress: pip install --no-deps -r "
            "requirements/eval.txt, or choose others with --methods"
        )


@dataclass(frozen=True)
class Eviction:
    """A kvpress method that evicts tokens per layer and head.

    Attributes:
        name: how reports call it.
        build: makes the press for a share of tokens to remove.
    """

    name: str
    build: Callable[[float], Any]
    fixed_shares: tuple[float, ...] = ()

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        # Whole pages first; lists of uneven length then waste half a page each, which is
        # taken off once so that the bytes come out at the budget or just below.
        tokens = int(budget * prefill.num_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if tokens == 0:
            raise ValueError(
                f"--budgets: {budget} of {prefill.num_tokens} tokens is less than a page of "
                f"{BLOCK_TOKENS} per head, which {self.name} needs"
            )
        if tokens >= prefill.num_tokens:
            return full_cache(prefill)
        held = self._keep(model, prefill, tokens)
        over = (held.share - budget) * prefill.num_tokens
        return held if over <= 0 else self._keep(model, prefill, tokens - int(over) - 1)

    def _keep(self, model: InProcessModel, prefill: Prefill, tokens: int) -> HeldCache:
        # kvpress rounds down what is left; half a token more makes it the number meant.
        press = self.build(1 - (tokens + 0.5) / prefill.num_tokens)
        layers = [
            _kept_tokens(press, attention, prefill, layer)
            for layer, attention in enumerate(model.attentions)
        ]
        return evicted(prefill, torch.stack(layers))


def _kept_tokens(press: Any, attention: Any, prefill: Prefill, layer: int) -> torch.Tensor:  # noqa: ANN401
    """Bool ``[kv_heads, tokens]``: what a press keeps in one layer."""
    from kvpress import AdaKVPress, PyramidKVPress
    from kvpress.utils import compute_n_kept

    keys, values = prefill.keys[layer : layer + 1], prefill.values[layer : layer + 1]
    inputs = prefill.inputs[layer]
    arguments = (attention, inputs["hidden_states"], keys, values, None, inputs)
    kept = torch.ones(keys.shape[1:3], dtype=torch.bool)
    if isinstance(press, AdaKVPress):
        press.compress(*arguments)
        _, heads, places = attention.masked_key_indices
        attention.masked_key_indices = None
        kept[heads, places] = False
        return kept
    if isinstance(press, PyramidKVPress):
        count = press.get_layer_budget(attention, prefill.num_tokens)
    else:
        count = compute_n_kept(prefill.num_tokens, press.compression_ratio)
    best = press.score(*arguments)[0].topk(count, dim=-1).indices
    return torch.zeros_like(kept).scatter_(1, best, True)


@dataclass(frozen=True)
class ChannelPruning:
    """ThinK: channels of the keys are dropped, values stay (arXiv 2407.21018).

    Attributes:
        name: how reports call it.
    """

    name: str = "think"
    fixed_shares: tuple[float, ...] = (0.75, 0.5625)

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        from kvpress import ThinKPress

        press = ThinKPress(key_channel_compression_ratio=2 * (1 - budget), window_size=WINDOW)
        layers = [
            press.compress(
                attention,
                inputs["hidden_states"],
                prefill.keys[layer : layer + 1].clone(),
                prefill.values[layer : layer + 1],
                None,
                inputs,
            )[0][0]
            for layer, (attention, inputs) in enumerate(
                zip(model.attentions, prefill.inputs, strict=True)
            )
        ]
        kept = torch.ones(prefill.keys.shape[:3], dtype=torch.bool)
        return HeldCache(torch.stack(layers), prefill.values, kept, budget)


def snapkv(removed: float) -> Any:  # noqa: ANN401
    """SnapKV (arXiv 2404.14469)."""
    from kvpress import SnapKVPress

    return SnapKVPress(compression_ratio=removed, window_size=WINDOW)


def adakv(removed: float) -> Any:  # noqa: ANN401
    """Ada-KV over SnapKV (arXiv 2407.11550)."""
    from kvpress import AdaKVPress

    return AdaKVPress(snapkv(removed))


def pyramidkv(removed: float) -> Any:  # noqa: ANN401
    """PyramidKV (arXiv 2406.02069).

    Where its smallest layer would hold less than the window, as it does at small budgets of
    prompts of some thousand tokens, kvpress falls back to SnapKV.
    """
    from kvpress import PyramidKVPress

    return PyramidKVPress(compression_ratio=removed, window_size=WINDOW)


def expected_attention(removed: float) -> Any:  # noqa: ANN401
    """Expected attention (kvpress's own)."""
    from kvpress import ExpectedAttentionPress

    return ExpectedAttentionPress(compression_ratio=removed)


def tova(removed: float) -> Any:  # noqa: ANN401
    """TOVA (arXiv 2401.06104)."""
    from kvpress import TOVAPress

    return TOVAPress(compression_ratio=removed)
