"""The lease plan: which blocks of a prompt stay, as a pure function both sides can call.

vLLM's scheduler frees blocks and its worker rewrites them, in different processes.
Both compute the same plan from the same few numbers, so no message passes between them.

    prompt   |<------------- span: whole blocks ------------>|<- window and later ->|
    blocks   | freed: keep their prefix-cache hash  | lease  |  full dimension      |
             0                                 first_lease_block   tail_block
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
class LeaseTerms:
    """What a plan depends on besides the prompt: fixed for a server, or set per request.

    Attributes:
        block_size: tokens in one vLLM block.
        window: prompt tokens at the end that always stay at full dimension.
        min_prompt_tokens: shorter prompts are left alone.
        budget: share of the prompt's KV bytes to keep, in (0, 1]; 1 means no compression.
        min_blocks: blocks a lease needs whatever the budget (page table, prompt basis).
        floor_tokens_per_page: tokens per page of the cheapest format where no token may be
            dropped, which bounds the lease from below; None where dropping is allowed.
    """

    block_size: int
    window: int
    min_prompt_tokens: int
    budget: float
    min_blocks: int = 1
    floor_tokens_per_page: int | None = None


@dataclass(frozen=True)
class LeasePlan:
    """Blocks of one prompt after compression.

    Attributes:
        prompt_tokens: length of the prompt.
        first_lease_block: block-table index of the first block kept; those before it are
            freed.
        tail_block: block-table index of the first block at full dimension; the lease is
            ``first_lease_block .. tail_block - 1``.
        block_size: tokens in one block.
    """

    prompt_tokens: int
    first_lease_block: int
    tail_block: int
    block_size: int

    @property
    def num_lease_blocks(self) -> int:
        """Blocks the compressed span keeps."""
        return self.tail_block - self.first_lease_block

    @property
    def span_tokens(self) -> int:
        """Prompt tokens that are compressed."""
        return self.tail_block * self.block_size

    @property
    def kept_share(self) -> float:
        """Bytes kept of the prompt (lease and tail) over its full bytes."""
        tail_tokens = self.prompt_tokens - self.span_tokens
        kept = self.num_lease_blocks * self.block_size + tail_tokens
        return kept / self.prompt_tokens


def plan_lease(prompt_tokens: int, terms: LeaseTerms) -> LeasePlan | SkipReason:
    """Plan the lease of a prompt, or say why it stays uncompressed.

    The budget covers everything the prompt holds: lease (with its page table and prompt
    basis) and the full-dimension tail of the prompt. It is met from below, in whole
    blocks, except that a lease is never smaller than ``min_blocks`` nor than its formats'
    floor.

    Args:
        prompt_tokens: length of the prompt.
        terms: everything else the plan depends on.
    """
    kept_tokens = terms.budget * prompt_tokens
    if kept_tokens >= prompt_tokens:
        return SkipReason.FULL_BUDGET
    if prompt_tokens < terms.min_prompt_tokens:
        return SkipReason.TOO_SHORT
    tail_block = (prompt_tokens - terms.window) // terms.block_size
    span_tokens = tail_block * terms.block_size
    tail_tokens = prompt_tokens - span_tokens
    affordable = int((kept_tokens - tail_tokens) // terms.block_size)
    lease_blocks = max(affordable, terms.min_blocks)
    if terms.floor_tokens_per_page is not None:
        floor = terms.min_blocks - 1 + -(-span_tokens // terms.floor_tokens_per_page)
        lease_blocks = max(lease_blocks, floor)
    if lease_blocks >= tail_block:
        return SkipReason.NO_SAVING
    return LeasePlan(prompt_tokens, tail_block - lease_blocks, tail_block, terms.block_size)
