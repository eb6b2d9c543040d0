"""A segment: consecutive blocks of a request that one compression takes."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("prompt", "answer")
"""What a segment is part of: a segment that ripens with generated tokens is of the answer."""


@dataclass(frozen=True)
class SegmentBlocks:
    """Where a segment and its lease lie in a request's block table.

    Attributes:
        first_block: index of its first block.
        first_lease_block: of the first block kept; those of the segment before it are freed.
        end_block: its boundary, one past its last block; the lease is
            ``first_lease_block .. end_block - 1``.
    """

    first_block: int
    first_lease_block: int
    end_block: int

    @property
    def num_blocks(self) -> int:
        """Blocks that it has before it is compressed."""
        return self.end_block - self.first_block

    @property
    def num_freed_blocks(self) -> int:
        """Blocks before its lease, which are given back."""
        return self.first_lease_block - self.first_block

    @property
    def num_lease_blocks(self) -> int:
        """Blocks that it keeps."""
        return self.end_block - self.first_lease_block

    @property
    def lease(self) -> tuple[int, int]:
        """First block of the lease and the one behind its last."""
        return self.first_lease_block, self.end_block


class SharedSegment(SegmentBlocks):
    """A segment that another request compressed, and whose lease this one reads."""


@dataclass(frozen=True)
class Segment(SegmentBlocks):
    """Consecutive blocks of a request that one compression takes.

    Attributes:
        block_size: tokens in one block.
        window_start: position of the first query that scores it.
        ripe_at: computed tokens from which it may be compressed, one past the last such query.
        due_at: computed tokens at which it is compressed before anything else is computed, so
            that its blocks may be freed.
        part: one of :data:`PARTS`.
    """

    block_size: int
    window_start: int
    ripe_at: int
    due_at: int
    part: str

    @property
    def for_others(self) -> SharedSegment:
        """The same as another request that reads its lease has it."""
        return SharedSegment(self.first_block, self.first_lease_block, self.end_block)

    @property
    def first_token(self) -> int:
        """Its first token's position."""
        return self.first_block * self.block_size

    @property
    def end_token(self) -> int:
        """The position behind its last token."""
        return self.end_block * self.block_size

    @property
    def span_tokens(self) -> int:
        """Tokens that are compressed."""
        return self.num_blocks * self.block_size

    @property
    def loaded_tokens(self) -> int:
        """Tokens that its compression reads: its own, and those up to the end of its window."""
        return self.ripe_at - self.first_token

    @property
    def loaded_end(self) -> int:
        """One past the last block of those tokens."""
        return -(-self.ripe_at // self.block_size)
