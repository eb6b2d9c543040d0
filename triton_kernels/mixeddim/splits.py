"""How many programs share a batch: as many as the device holds at once, says the compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .attend import attend_split
from .shapes import DecodeShape

MAX_SPLITS = 128
MIN_SPLITS = 4
"""Even a batch that fills the device may have one long request."""

MIN_PAGES = 4
"""Pages that a program takes at least where there are fewer units than programs wanted."""
MIN_PAGES_FULL = 32
"""The same where there are as many; a part then costs little beside its pages."""

STAGES = 1
"""Pages in flight per program. The programs beside it cover the latency: those of every head size
together have enough bytes in flight, which the tests hold (tests/kernels/test_splits.py)."""

_PROGRAMS_WITHOUT_GPU = 24

_QUARTERS = 4
"""Of a multiprocessor: each has its own registers and its own warps."""
_RESERVED_SHARED = 1024
"""Bytes of shared memory that a program takes beside its own (CUDA programming guide)."""
_MAX_PROGRAMS = 24
"""Programs of a multiprocessor: 16 to 32, by architecture, none of which is the limit here."""


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs of one multiprocessor share.

    Attributes:
        registers: of 32 bits.
        shared: bytes of shared memory.
        warps: that are resident at most.
    """

    registers: int
    shared: int
    warps: int

    @classmethod
    def of(cls, device: torch.device) -> Multiprocessor:
        """That of a CUDA device."""
        found = torch.cuda.get_device_properties(device)
        return cls(
            found.regs_per_multiprocessor,
            found.shared_memory_per_multiprocessor,
            found.max_threads_per_multi_processor // found.warp_size,
        )

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """Programs that are resident at once.

        Args:
            registers: per thread.
            shared: bytes per program.
            warps: per program.
        """
        # Registers are given to whole warps, 256 at a time.
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // _QUARTERS // per_warp * _QUARTERS
        by_warps = min(by_registers, self.warps) // warps
        return min(by_warps, self.shared // (shared + _RESERVED_SHARED), _MAX_PROGRAMS)


def resident_programs(shape: DecodeShape, device: torch.device) -> int:
    """Programs of ``attend_split`` that a device holds at once; compiles the kernel.

    Args:
        shape: what it is compiled for.
        device: where it is to run; without a GPU, any number.
    """
    if device.type != "cuda":
        return _PROGRAMS_WITHOUT_GPU
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.cuda.device(device):
        return count * programs_per_multiprocessor(shape, Multiprocessor.of(device))


def programs_per_multiprocessor(shape: DecodeShape, multiprocessor: Multiprocessor) -> int:
    """Programs of ``attend_split`` that are resident at once on the current device; compiles it."""
    element, float32 = shape.layout.geometry.dtype, torch.float32
    head, size = shape.head_size, shape.num_kv_heads * shape.group * shape.head_size
    table = (torch.int32, 1, torch.int32, torch.int32)
    # As Triton's tutorials read a kernel's registers.
    kernel: Any = attend_split.warmup(
        element, size, head, float32, torch.uint8, *table, 0, 1.0, MIN_PAGES, float32, float32,
        SHAPE=shape, STAGES=STAGES, num_warps=shape.num_warps, grid=(1,),
    )  # fmt: skip
    kernel._init_handles()
    return max(multiprocessor.programs(kernel.n_regs, kernel.metadata.shared, shape.num_warps), 1)


@dataclass(frozen=True)
class SplitPlan:
    """How a batch is cut, from its shape alone.

    Attributes:
        splits: programs per unit, a power of two.
        min_pages: pages a program takes at least.
    """

    splits: int
    min_pages: int

    @classmethod
    def of(cls, queries: int, kv_heads: int, programs: int) -> SplitPlan:
        """Plan for a batch.

        Args:
            queries: queries in the batch, padding included.
            kv_heads: KV heads per layer.
            programs: programs that are resident at once, see :func:`resident_programs`.
        """
        wanted = -(-programs // (queries * kv_heads))
        splits = min(max(1 << (wanted - 1).bit_length(), MIN_SPLITS), MAX_SPLITS)
        return cls(splits, MIN_PAGES if wanted > MIN_SPLITS else MIN_PAGES_FULL)
