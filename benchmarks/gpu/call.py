"""The kernel's call on the inputs of a load, as it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mdkv_vllm.ops import cuda
from mdkv_vllm.triton_kernels import mixed_decode as triton
from mdkv_vllm.triton_kernels.shapes import DecodeShape

from .inputs import Inputs

Decode = Callable[..., None]
"""Takes what :func:`mdkv_vllm.triton_kernels.mixed_decode.mixed_decode` takes."""


@dataclass(frozen=True)
class Kernel:
    """An implementation of the decode kernel.

    Attributes:
        name: in reports.
        decode: the kernel.
        tables: makes its tables of a layout, a group, a basis and a device.
        workspace: allocates its memory for a shape, a number of queries and a device.
    """

    name: str
    decode: Decode
    tables: Callable[..., Any]
    workspace: Callable[..., Any]


def _triton_workspace(
    shape: DecodeShape, queries: int, device: torch.device
) -> triton.DecodeWorkspace:
    return triton.DecodeWorkspace.allocate(shape, queries, device, triton.programs_of(device))


TRITON = Kernel("Triton", triton.mixed_decode, triton.DecodeTables.build, _triton_workspace)
CUDA = Kernel("CUDA", cuda.mixed_decode, cuda.DecodeTables.build, cuda.DecodeWorkspace.allocate)


def kernels() -> tuple[Kernel, ...]:
    """Those that can run here."""
    return (TRITON, CUDA) if cuda.available() else (TRITON,)


def poison(workspace: object) -> None:
    """Set every bit of a workspace's tensors: NaN, as floating-point numbers."""
    for tensor in vars(workspace).values():
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(0xFF)


class Call:
    """Attention of every set of requests in turn.

    Args:
        inputs: the requests.
        device: where they are.
        kernel: what attends.
    """

    def __init__(self, inputs: Inputs, device: torch.device, kernel: Kernel = TRITON) -> None:
        self.inputs, self.kernel = inputs, kernel
        self.tables = kernel.tables(inputs.layout, inputs.group, inputs.basis, device)
        self.workspace = kernel.workspace(self.tables.shape, len(inputs.lengths), device)
        self.output = torch.empty_like(inputs.queries[0])
        self.scale = inputs.layout.geometry.head_size**-0.5

    def poison(self) -> None:
        """Fill what the next step has to write with NaN."""
        poison(self.workspace)
        self.output.fill_(torch.nan)

    def step(self, index: int) -> None:
        """Attend with one set of requests."""
        inputs = self.inputs
        self.kernel.decode(
            inputs.queries[index],
            inputs.arena,
            0,
            self.tables,
            inputs.block_table,
            inputs.query_rows[index],
            inputs.lengths,
            inputs.leases,
            self.scale,
            self.output,
            self.workspace,
        )
