"""The kernels under test, and their calls on the inputs of a load, as they are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mdkv_vllm.ops import cuda
from mdkv_vllm.triton_kernels import mixed_decode as triton

from . import plant
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


TRITON = Kernel(
    "Triton", triton.mixed_decode, triton.DecodeTables.build, triton.DecodeWorkspace.allocate
)
CUDA = Kernel("CUDA", cuda.mixed_decode, cuda.DecodeTables.build, cuda.DecodeWorkspace.allocate)
KERNELS = {kernel.name: kernel for kernel in (TRITON, CUDA)}


def kernel_named(name: str) -> Kernel:
    """A kernel for a job, with the fault that the rehearsal has planted in it, if any.

    Raises:
        CudaKernelError: it is CUDA, whose library is not there or is of another version.
    """
    kernel = KERNELS[name]
    if kernel is CUDA:
        cuda.library()
    return Kernel(name, plant.around(kernel.decode), kernel.tables, kernel.workspace)


def poison(workspace: object) -> None:
    """Set every bit of a workspace's tensors: NaN, as floating-point numbers."""
    for tensor in vars(workspace).values():
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(0xFF)


class Call:
    """Attention of every set of requests in turn, layer by layer where there are several.

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

    @property
    def steps(self) -> int:
        """Different inputs of :meth:`step`: every layer of every set."""
        return self.inputs.sets * self.inputs.layout.num_layers

    def poison(self) -> None:
        """Fill what the next step has to write with NaN."""
        poison(self.workspace)
        self.output.fill_(torch.nan)

    def step(self, index: int) -> None:
        """Attend with one set of requests in one layer."""
        inputs = self.inputs
        of, layer = divmod(index, inputs.layout.num_layers)
        self.kernel.decode(
            inputs.queries[of],
            inputs.arena,
            layer,
            self.tables,
            inputs.block_table,
            inputs.query_rows[of],
            inputs.lengths,
            inputs.leases,
            self.scale,
            self.output,
            self.workspace,
        )
