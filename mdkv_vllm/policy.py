"""The configuration applied to one model: what every prompt's plan and formats are.

Scheduler and worker each build one from equal arguments and therefore always agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from mdkv_vllm.config import PROMPT_BASIS, Budget, MixedDimConfig
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.plan import LeasePlan, LeaseTerms, plan_lease


class SkipReason(Enum):
    """Why a prompt stays uncompressed."""

    DISABLED = "disabled"
    """Compression is off on this server."""
    FULL_BUDGET = "full_budget"
    """Its budget keeps everything."""
    TOO_SHORT = "too_short"
    """It has fewer than ``min_prompt_tokens`` tokens."""
    NO_SAVING = "no_saving"
    """Page table, formats and whole blocks leave nothing to give back."""
    SHARED_BLOCKS = "shared_blocks"
    """A prefix-cache hit covers blocks that its lease would have to write."""
    SESSION = "session"
    """Its prompt grows later (streaming input)."""
    NOT_GENERATION = "not_generation"
    """It is a pooling request."""


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

    def plan(self, prompt_tokens: int, budget: Budget | None) -> LeasePlan | None:
        """Plan a prompt's lease, or None where it stays uncompressed.

        Args:
            prompt_tokens: its length.
            budget: its own budget; None for the server's.
        """
        if not self.config.enabled:
            return None
        floor = None if self.formats.drop else self.formats.formats[0].tokens_per_page
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

    def skip_reason(self, prompt_tokens: int, budget: Budget | None) -> SkipReason:
        """Why :meth:`plan` gave None for these arguments."""
        if not self.config.enabled:
            return SkipReason.DISABLED
        if self.share(prompt_tokens, budget) == 1:
            return SkipReason.FULL_BUDGET
        if prompt_tokens < max(self.config.min_prompt_tokens, self.config.window + 1):
            return SkipReason.TOO_SHORT
        return SkipReason.NO_SAVING
