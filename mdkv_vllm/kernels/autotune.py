"""Which of two decode kernels is faster on a GPU: measured once, when a server starts.

The workload has one layer of the model's own shape and as many requests as make a cache larger than
the second-level cache. Its pages are zero, which is a value in every format; what is in them does
not change how long they take to read.
"""

from __future__ import annotations

from functools import cache

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig, DecodeKernel, MakeDecode

REQUESTS = 32
BYTES = 128 << 20
"""Of the workload's leases together: more than second-level caches hold."""
TAIL_BLOCKS = 2
CALLS = 20
"""Calls in a CUDA graph, so that what is timed is the GPU."""
REPLAYS = 5


class Workload:
    """A batch of requests of one layer, each with a lease of equal pages of every format.

    Args:
        layout: the model's; all but its number of layers is kept.
        group: query heads per KV head.
        device: where to try.
        lease_bytes: of all requests together, about.
    """

    def __init__(
        self, layout: LeaseLayout, group: int, device: torch.device, lease_bytes: int
    ) -> None:
        geometry, heads = layout.geometry, layout.num_kv_heads
        self.layout = LeaseLayout(geometry, layout.formats, 1, heads, layout.prompt_basis_rank)
        per_block = heads * geometry.page_bytes
        lists = len(layout.formats.formats)
        lease = max(lease_bytes // REQUESTS // per_block, self.layout.min_blocks + lists)
        held = lease + TAIL_BLOCKS
        shape = (REQUESTS * held, heads, geometry.block_size, 2 * geometry.head_size)
        self.kv_cache = torch.zeros(shape, dtype=geometry.dtype, device=device)
        pages = self.layout.list_pages(lease) // (heads * lists)
        capacity = layout.formats.capacity(torch.device("cpu"))
        table = self.layout.page_table((pages * capacity).expand(1, heads, lists))
        raw = table.contiguous().view(torch.uint8).flatten().to(device)
        blocks = self.kv_cache.view(torch.uint8).view(REQUESTS, -1)
        blocks[:, : raw.numel()] = raw
        table = torch.arange(shape[0], dtype=torch.int32, device=device).view(REQUESTS, held)
        rows = torch.arange(REQUESTS, dtype=torch.int32, device=device)
        leases = torch.tensor([[[0, lease]]] * REQUESTS, dtype=torch.int32, device=device)
        lengths = torch.full_like(rows, held * geometry.block_size)
        self.batch = DecodeBatch(table, rows, lengths, leases)
        self.query = torch.randn(REQUESTS, heads * group, geometry.head_size, device=device).to(
            geometry.dtype
        )
        self.output = torch.empty_like(self.query)
        rank = layout.formats.basis_rank
        directions = torch.eye(geometry.head_size)[:, :rank].expand(1, heads, -1, -1)
        own = layout.prompt_basis_rank > 0
        basis = Basis(directions, directions) if rank and not own else None
        self.config = DecodeConfig(
            self.kv_cache, self.layout, group, basis, geometry.head_size**-0.5, REQUESTS
        )

    def attend(self, kernel: DecodeKernel) -> None:
        """One call."""
        kernel.attend(self.query, 0, self.batch, self.output)


@cache
def measure(
    layout: LeaseLayout,
    group: int,
    device: torch.device,
    candidates: tuple[tuple[str, MakeDecode], ...],
) -> dict[str, float]:
    """Milliseconds of one layer's attention by each candidate.

    Args:
        layout: what the model's leases look like.
        group: query heads per KV head.
        device: a GPU.
        candidates: names of kernels, and what makes them.
    """
    workload = Workload(layout, group, device, BYTES)
    return {name: _time(workload, make(workload.config)) for name, make in candidates}


def _time(workload: Workload, kernel: DecodeKernel) -> float:
    """Milliseconds of a call, the best of some replays."""
    workload.attend(kernel)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            workload.attend(kernel)
    best = float("inf")
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / CALLS)
    return best
