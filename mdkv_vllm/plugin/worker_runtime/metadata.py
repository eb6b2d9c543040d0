"""One step's batch, split into what each kernel does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mdkv_vllm.kernels.interface import DecodeBatch, PrefillStep


@dataclass(frozen=True)
class Decode:
    """Query tokens that go through the mixed decode kernel one by one.

    Attributes:
        tokens: int64 ``[queries]`` positions in the batch's query tensor, or a slice.
        batch: what each of them attends to.
    """

    tokens: torch.Tensor | slice
    batch: DecodeBatch


@dataclass(frozen=True)
class Capture:
    """Window queries to keep for a compression.

    Attributes:
        window: ``[layers, query_heads, window, head_size]``, filled as layers run.
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
        prefill: chunks of prompts, None if there are none.
        decode: everything else, None if there is nothing else.
        captures: window queries to keep.
        recent: first queries of the batch that are kept in any case, because the step may be
            replayed from a CUDA graph, which runs no :class:`Capture`.
    """

    prefill: PrefillStep | None = None
    decode: Decode | None = None
    captures: list[Capture] = field(default_factory=list)
    recent: int = 0


@dataclass(frozen=True)
class StepLimits:
    """How large a step may be.

    Attributes:
        tokens: query tokens.
        requests: rows.
        leases: of a request.
        graph_tokens: the largest batch that a CUDA graph holds; 0 without graphs.
        decode_tokens: query tokens of a request that generates: its last token and the drafts
            behind it.
    """

    tokens: int
    requests: int
    leases: int
    graph_tokens: int = 0
    decode_tokens: int = 1


class StepBuffers:
    """Tensors on the device that every step's numbers are copied into.

    A CUDA graph holds their addresses, so they are made once. Copies from pinned memory do not
    wait for the device.

    Args:
        limits: the largest step.
        device: where the cache is.
    """

    def __init__(self, limits: StepLimits, device: torch.device) -> None:
        self._rows = torch.zeros(limits.tokens, dtype=torch.int32, device=device)
        self._lengths = torch.zeros_like(self._rows)
        shape = (limits.requests, limits.leases, 2)
        self._leases = torch.zeros(shape, dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"

    def load(
        self,
        block_table: torch.Tensor,
        rows: Sequence[int],
        lengths: Sequence[int],
        leases: Mapping[int, Sequence[tuple[int, int]]],
    ) -> DecodeBatch:
        """A batch of a step's numbers.

        Args:
            block_table: int32 ``[rows, max_blocks]``, on the device.
            rows: of each query.
            lengths: keys that each query sees; 0 for padding.
            leases: by row of the block table, each lease's first block and the one behind its last.
        """

        def load(buffer: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
            return buffer[: len(host)].copy_(host, non_blocking=True)

        def integers(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, pin_memory=self._pinned)

        shape = (len(block_table), *self._leases.shape[1:])
        by_row = torch.zeros(shape, dtype=torch.int32, pin_memory=self._pinned)
        for row, held in leases.items():
            by_row[row, : len(held)] = torch.tensor(held, dtype=torch.int32)
        return DecodeBatch(
            block_table,
            load(self._rows, integers(rows)),
            load(self._lengths, integers(lengths)),
            load(self._leases, by_row),
        )
