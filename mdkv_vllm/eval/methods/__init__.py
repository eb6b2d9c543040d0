"""Compression methods to compare, each applied to the same prefilled prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mdkv_vllm.config import EVEN_HEADS, HEADS_FILE
from mdkv_vllm.core.plan import Rule
from mdkv_vllm.eval.held_request import HeldRequest
from mdkv_vllm.eval.methods import eviction
from mdkv_vllm.eval.methods.baseline import Full, Recent
from mdkv_vllm.eval.methods.eviction import WINDOW, ChannelPruning, Eviction
from mdkv_vllm.eval.methods.kvcompress import HEADKV_BUDGETS, HeadKV, KVCompress
from mdkv_vllm.eval.methods.ours import MixedDim
from mdkv_vllm.eval.methods.quantized import Float8, Uniform
from mdkv_vllm.models.held_cache import HeldCache, Prefill
from mdkv_vllm.models.in_process import InProcessModel


class Method(Protocol):
    """One way to hold a prompt in fewer bytes."""

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    @property
    def fixed_shares(self) -> tuple[float, ...]:
        """The only shares of bytes it can hold, or none if any budget will do."""
        ...

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """Hold a prompt within a share of its full bytes.

        Args:
            model: the model that prefilled it.
            prefill: the prompt.
            budget: share of the bytes in 16 bit; one of ``fixed_shares`` where there are any.
        """
        ...


NEED_HEAD_SCORES = ("ours-even", "ours-warm", "paper-h", "headkv")
"""Methods that cannot be applied, or say nothing new, for a model without head scores."""


def begin(
    method: Method,
    model: InProcessModel,
    prefill: Prefill,
    budget: float,
    earlier: Sequence[int] = (),
) -> HeldRequest:
    """A request that has computed its prompt and is held as a method does.

    Args:
        method: ours compresses what is generated too; under the others it stays at full size.
        model: the model that prefilled the prompt.
        prefill: the prompt.
        budget: see :meth:`Method.apply`.
        earlier: of a conversation's earlier turns, how many of these tokens are their prompt.
    """
    if isinstance(method, MixedDim):
        return method.begin(model, prefill, budget, earlier)
    return HeldRequest(model, method.apply(model, prefill, budget), prefill.logits)


def methods_for(model: InProcessModel) -> dict[str, Method]:
    """Every method by name."""
    scores = str(model.folder / HEADS_FILE)
    paper = {"formats": "paper", "basis": "prompt", "loss": "paper", "window": WINDOW}
    known: list[Method] = [
        Full(),
        Recent(),
        MixedDim("ours"),
        MixedDim("ours-even", {"heads": EVEN_HEADS}),
        MixedDim("ours-rolling", {"segments": Rule.ROLLING.value}),
        MixedDim("ours-warm", warm=True),
        MixedDim("paper", {**paper, "heads": EVEN_HEADS}),
        MixedDim("paper-h", {**paper, "heads": scores, **HEADKV_BUDGETS}),
        Eviction("snapkv", eviction.snapkv),
        Eviction("adakv", eviction.adakv),
        Eviction("pyramidkv", eviction.pyramidkv),
        Eviction("expected", eviction.expected_attention),
        Eviction("tova", eviction.tova),
        KVCompress(),
        HeadKV(),
        ChannelPruning(),
        Float8(),
        Uniform("int8", 8, model.head_size),
        Uniform("int4", 4, model.head_size),
        Uniform("int2", 2, model.head_size),
    ]
    return {method.name: method for method in known}
