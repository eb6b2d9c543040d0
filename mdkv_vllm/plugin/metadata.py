"""One step's batch, split into what each kernel does."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mdkv_vllm.plugin.prefill import Prefill


@dataclass(frozen=True)
class Decode:
    """Query tokens that go through the mixed decode kernel one by one.

    Attributes:
        tokens: int64 ``[queries]`` positions in the batch's query tensor, or a slice.
        rows: int32 ``[queries]`` block-table row of each.
        lengths: int32 ``[queries]`` keys each may see.
        leases: int32 ``[rows, 2]`` first lease block and tail block; 0, 0 for none.
        block_table: int32 ``[rows, max_blocks]``.
    """

    tokens: torch.Tensor | slice
    rows: torch.Tensor
    lengths: torch.Tensor
    leases: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class Capture:
    """Window queries to keep for a compression.

    Attributes:
        window: float32 ``[layers, query_heads, window, head_size]``, filled as layers run.
        at: first window position to fill.
        start: first query token in the batch.
        count: how many.
    """

    window: torch.Tensor
    at: int
    start: int
    count: int

    def copy(self, layer: int, query: torch.Tensor) -> None:
        """Keep one layer's queries, ``[tokens, query_heads, head_size]``."""
        rows = query[self.start : self.start + self.count]
        self.window[layer, :, self.at : self.at + self.count] = rows.transpose(0, 1)


@dataclass
class MixedDimMetadata:
    """What every layer does in one step.

    Attributes:
        prefills: chunks of prompts.
        decode: everything else, None if there is nothing else.
        captures: window queries to keep.
    """

    prefills: list[Prefill] = field(default_factory=list)
    decode: Decode | None = None
    captures: list[Capture] = field(default_factory=list)
