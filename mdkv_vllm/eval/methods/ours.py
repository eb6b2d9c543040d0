"""MixedDimKV as the server does it, read back from the bytes of its leases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mdkv_vllm.artifacts.store import load_basis, load_head_budgets
from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.plan import RequestPlan
from mdkv_vllm.eval.held_request import HeldRequest
from mdkv_vllm.eval.methods.segments import SegmentedRequest
from mdkv_vllm.kernels.cpu.compress import CpuKernels
from mdkv_vllm.models.held_cache import BLOCK_TOKENS, HeldCache, Prefill, full_cache
from mdkv_vllm.models.in_process import InProcessModel
from mdkv_vllm.policy import Policy


@dataclass(frozen=True)
class MixedDim:
    """Compress with the server's own code and settings.

    Attributes:
        name: how reports call it.
        settings: ``MixedDimConfig`` fields other than the budget.
        warm: whether a conversation's later turns read what the earlier ones left compressed,
            as they do on a server; without, each is computed anew.
    """

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    warm: bool = False
    fixed_shares: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> MixedDim:
        """A method from a name and settings.

        Args:
            text: such as ``ours:window=32,segments=rolling``, or the settings as a JSON object
                behind the colon.

        Raises:
            ValueError: the settings are none, or out of range.
        """
        given = text.partition(":")[2]
        try:
            settings = json.loads(given) if given.startswith("{") else _settings(given)
        except ValueError as error:
            raise ValueError(
                f"--methods: {text!r} has no settings behind its colon ({error}); allowed are such "
                "as ours:window=32,segments=rolling, or a JSON object"
            ) from error
        for name in ("budget", "budget_tokens"):
            if name in settings:
                raise ValueError(f"--methods: {name} has a flag of its own; give --budgets")
        MixedDimConfig.from_additional_config({"mixeddim": settings})
        return cls(text, settings)

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        return self.begin(model, prefill, budget).cache

    def begin(
        self,
        model: InProcessModel,
        prefill: Prefill,
        budget: float,
        earlier: Sequence[int] = (),
    ) -> HeldRequest:
        """A request that has computed its prompt, whose answer will be compressed as well.

        Args:
            model: the model that prefilled the prompt.
            prefill: the prompt, with all of its queries if it may have several segments.
            budget: share of the bytes in 16 bit.
            earlier: of the conversation's earlier turns, how many of these tokens are their prompt.
        """
        config = MixedDimConfig(budget=budget, **self.settings)  # type: ignore[arg-type]
        # Bytes are counted against a 16-bit cache whatever the model computes in.
        dtype = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
        geometry = PageGeometry(BLOCK_TOKENS, model.head_size, dtype)
        sizes = (model.num_layers, model.num_kv_heads)
        heads = load_head_budgets(config, str(model.folder), sizes)
        policy = Policy(config, geometry, *sizes, head_scores=heads is not None)
        basis, kernels = self._basis(model, policy), CpuKernels()
        compressor = Compressor(
            policy.layout, LOSSES[config.loss], model.scale, basis, heads, kernels
        )
        prompts = (*earlier, prefill.num_tokens) if self.warm else (prefill.num_tokens,)
        request: SegmentedRequest | None = None
        for tokens in prompts:
            shared = request.for_others if request and policy.shares else ()
            plan = policy.plan(tokens, shared=shared)
            if not isinstance(plan, RequestPlan):
                request = None
            elif request is None or not shared:
                request = SegmentedRequest.begin(model, prefill, plan, compressor)
            else:
                request = request.followed_by(prefill.token_ids[:tokens], plan)
        return request or HeldRequest(model, full_cache(prefill), prefill.logits)

    def _basis(self, model: InProcessModel, policy: Policy) -> Basis | None:
        if not policy.formats.uses_basis or policy.prompt_basis:
            return None
        path = policy.config.basis_path(str(model.folder))
        sizes = (model.num_layers, model.num_kv_heads, model.head_size)
        return load_basis(path, str(model.folder), sizes).truncate(policy.formats.basis_rank)


def _settings(text: str) -> dict[str, object]:
    """Settings from ``name=value,name=value``; a value that is no JSON is a text."""
    settings: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is no NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings
