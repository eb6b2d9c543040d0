"""Where a step's chunks of prompts lie, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from mdkv_vllm.kernels.interface import Chunk


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
