"""Where a step's chunks of prompts and their leases lie, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from mdkv_vllm.kernels.interface import Chunk, ReadConfig


def tokens_of(chunks: Sequence[Chunk], device: torch.device) -> torch.Tensor | slice:
    """Where the chunks' tokens are in the batch: a slice where they are side by side."""
    if all(a.stop == b.start for a, b in pairwise(chunks)):
        return slice(chunks[0].start, chunks[-1].stop)
    tokens = [token for chunk in chunks for token in range(chunk.start, chunk.stop)]
    return on_device(tokens, torch.int64, device)


def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device, without waiting for it."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def runs_on_device(runs: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """int64 numbers ``begin .. end - 1`` of every run, one after the other, on a device."""
    host = torch.cat([torch.arange(begin, end) for begin, end in runs])
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def read_page_tables(
    config: ReadConfig, chunks: Sequence[Chunk], block_table: torch.Tensor
) -> torch.Tensor:
    """Page tables of all the chunks' leases: int32 ``[leases, layers, kv_heads, formats, 2]``."""
    rows = [chunk.row for chunk in chunks for _ in chunk.leases]
    firsts = [first for chunk in chunks for first, _ in chunk.leases]
    device = block_table.device
    blocks = block_table[
        on_device(rows, torch.int64, device), on_device(firsts, torch.int64, device)
    ]
    shape = config.layout.table_shape
    size = shape[0] * shape[1] * shape[2] * shape[3]
    words = config.kv_cache.flatten(1).view(torch.int32)[:, :size]
    return words.index_select(0, blocks).view(len(rows), *shape)
