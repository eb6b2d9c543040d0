"""The configuration applied to one model: what every prompt's plan and formats are.

Scheduler and worker each build one from equal arguments and therefore always agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mdkv_vllm.config import PROMPT_BASIS, Budget, MixedDimConfig
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.plan import LeasePlan, LeaseTerms, SkipReason, plan_lease
from mdkv_vllm.request import CompressionRequest


@dataclass(frozen=True)
class Policy:
    """A configuration and the sizes of the model it serves.

    Attributes:
        config: the settings.
        geometry: the cache's sizes.
        num_layers: attention layers on this rank.
        num_kv_heads: KV heads per layer on this rank.
    """

    config: MixedDimConfig
    geometry: PageGeometry
    num_layers: int
    num_kv_heads: int

    @cached_property
    def formats(self) -> FormatSet:
        """Formats that an allocation may choose from."""
        return self.config.format_set(self.geometry)

    @cached_property
    def prompt_basis(self) -> bool:
        """Whether every lease holds a basis of its own."""
        return self.config.basis == PROMPT_BASIS and self.formats.uses_basis

    @cached_property
    def layout(self) -> LeaseLayout:
        """What every lease of this model looks like."""
        rank = self.formats.basis_rank if self.prompt_basis else 0
        return LeaseLayout(self.geometry, self.formats, self.num_layers, self.num_kv_heads, rank)

    def plan_request(self, request: CompressionRequest) -> LeasePlan | SkipReason:
        """Plan a request's lease, or say why it has none."""
        if not request.generates:
            return SkipReason.NOT_GENERATION
        return self.plan(request.prompt_tokens, request.budget)

    def plan(self, prompt_tokens: int, budget: Budget | None = None) -> LeasePlan | SkipReason:
        """Plan a prompt's lease, or say why it has none.

        Args:
            prompt_tokens: its length.
            budget: its own budget; None for the server's.
        """
        if not self.config.enabled:
            return SkipReason.DISABLED
        floor = None if self.formats.drop else self.formats.cheapest.tokens_per_page
        terms = LeaseTerms(
            block_size=self.geometry.block_size,
            window=self.config.window,
            min_prompt_tokens=max(self.config.min_prompt_tokens, self.config.window + 1),
            budget=self.share(prompt_tokens, budget),
            min_blocks=self.layout.min_blocks,
            floor_tokens_per_page=floor,
        )
        return plan_lease(prompt_tokens, terms)

    def share(self, prompt_tokens: int, budget: Budget | None) -> float:
        """The share of a prompt's bytes that its budget asks to keep."""
        return (budget or self.config.default_budget).share_of(prompt_tokens)
