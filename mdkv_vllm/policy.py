"""The configuration applied to one model: what every request's plan and formats are.

Scheduler and worker each build one from equal arguments and therefore always agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from mdkv_vllm.config import PROMPT_BASIS, Budget, ConfigError, MixedDimConfig
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.plan import (
    AUTO_PROMPT_TOKENS,
    PlanTerms,
    RequestPlan,
    Rule,
    SkipReason,
    most_blocks,
    plan_request,
)
from mdkv_vllm.core.segment import Segment, SharedSegment
from mdkv_vllm.request import CompressionRequest


@dataclass(frozen=True)
class Policy:
    """A configuration and the sizes of the model it serves.

    Attributes:
        config: the settings.
        geometry: the cache's sizes.
        num_layers: attention layers: all of the model, or those of one pipeline stage.
        num_kv_heads: KV heads per layer on this rank.
        head_scores: whether heads have budgets by their scores.
        other_layers: whether layers that nobody compresses have blocks of their own.

    Raises:
        ConfigError: segments are not of whole blocks.
    """

    config: MixedDimConfig
    geometry: PageGeometry
    num_layers: int
    num_kv_heads: int
    head_scores: bool = False
    other_layers: bool = False

    def __post_init__(self) -> None:
        block, segment = self.geometry.block_size, self.config.segment_tokens
        if segment % block or segment < 2 * block:
            raise ConfigError(
                f"mixeddim.segment_tokens is {segment}; allowed are multiples of the block size "
                f"{block} from {2 * block} up"
            )

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

    def of_stage(self, num_layers: int) -> Policy:
        """The same for some of the layers: a pipeline stage, with leases in a cache of its own.

        What a plan needs of the layout, :attr:`.LeaseLayout.min_blocks`, is the same for any number
        of layers, so stages plan as the scheduler does.
        """
        return replace(self, num_layers=num_layers)

    @property
    def answers(self) -> bool:
        """See :meth:`.MixedDimConfig.compresses_answers`."""
        return self.config.compresses_answers(self.head_scores, self.formats.drop)

    @property
    def shares(self) -> bool:
        """See :meth:`.MixedDimConfig.shares_prefixes`.

        Not where other layers would have to hold just as much of a prefix, which vLLM lets a
        manager neither ask nor tell.
        """
        return not self.other_layers and self.config.shares_prefixes(self.head_scores)

    def plan_request(self, request: CompressionRequest) -> RequestPlan | SkipReason:
        """Plan a request's segments, or say why it has none."""
        if not request.generates:
            return SkipReason.NOT_GENERATION
        return self.plan(request.prompt_tokens, request.budget, request.shared)

    def plan(
        self,
        prompt_tokens: int,
        budget: Budget | None = None,
        shared: tuple[SharedSegment, ...] = (),
    ) -> RequestPlan | SkipReason:
        """Plan the segments of a request, or say why it has none.

        Args:
            prompt_tokens: length of its prompt.
            budget: its own budget; None for the server's.
            shared: segments of a cached prefix that it reads.
        """
        if not self.config.enabled:
            return SkipReason.DISABLED
        return plan_request(prompt_tokens, self.terms(self.share(prompt_tokens, budget)), shared)

    def terms(self, share: float) -> PlanTerms:
        """What plans depend on besides the prompt, at a share of the bytes to keep."""
        return PlanTerms(
            block_size=self.geometry.block_size,
            window=self.config.window,
            min_prompt_tokens=self.config.min_prompt_tokens,
            budget=share,
            segment_tokens=self.config.segment_tokens,
            rule=Rule(self.config.segments),
            answers=self.answers,
            shares=self.shares,
            min_blocks=self.layout.min_blocks,
            floor_tokens_per_page=(
                None if self.formats.drop else self.formats.cheapest.tokens_per_page
            ),
        )

    def share(self, prompt_tokens: int, budget: Budget | None) -> float:
        """The share of a prompt's bytes that its budget asks to keep."""
        return (budget or self.config.default_budget).share_of(prompt_tokens)

    def most_blocks(self, tokens: int, in_flight_tokens: int) -> int:
        """Blocks that no request with the server's budget ever holds more than.

        Args:
            tokens: of its prompt and answer together at most.
            in_flight_tokens: that may be scheduled beyond those that are known to be computed.
        """
        share = self.config.budget
        if not self.config.enabled or share is None:  # a number of tokens is all of short prompts
            share = 1.0
        return most_blocks(self.terms(share), tokens, in_flight_tokens)

    def sample_segments(self, tokens: int) -> list[Segment]:
        """The longest segment of requests of so many tokens at most, and one of an answer."""
        rule = Rule.PROMPT if not self.answers else Rule(self.config.segments)
        stride = 3 * self.config.segment_tokens // 2
        longest = {Rule.PROMPT: tokens, Rule.AUTO: AUTO_PROMPT_TOKENS, Rule.ROLLING: stride}[rule]
        plans = [self.plan(prompt) for prompt in (min(tokens, longest), 1)]
        return [next(plan.segments()) for plan in plans if isinstance(plan, RequestPlan)]

    def most_leases(self, tokens: int) -> int:
        """Leases of a request of so many tokens at most; shared ones are half a stride at least."""
        if not self.config.enabled or not self.answers:
            return 1
        return 2 + (1 + self.shares) * tokens // self.config.segment_tokens
