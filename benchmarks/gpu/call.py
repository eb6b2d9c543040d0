"""The kernels under test, and their calls on the inputs of a load, as they are timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.kernels.cuda.library import library
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig, DecodeKernel, MakeDecode
from mdkv_vllm.kernels.registry import DECODE

from . import plant
from .inputs import Inputs


@dataclass(frozen=True)
class Kernel:
    """An implementation of the decode kernel.

    Attributes:
        name: in reports.
        make: makes it for a model and a cache.
    """

    name: str
    make: MakeDecode


TRITON = Kernel("Triton", DECODE["triton"])
CUDA = Kernel("CUDA", DECODE["cuda"])
KERNELS = {kernel.name: kernel for kernel in (TRITON, CUDA)}


def kernel_named(name: str) -> Kernel:
    """A kernel for a job, with the fault that the rehearsal has planted in it, if any.

    Raises:
        CudaKernelError: it is CUDA, whose library is not there or is of another version.
    """
    kernel = KERNELS[name]
    if kernel is CUDA:
        library()
    return Kernel(name, plant.around(kernel.make))


def poison(kernel: DecodeKernel) -> None:
    """Set every bit of a kernel's scratch memory: NaN, as floating-point numbers."""
    for tensor in kernel.scratch():
        tensor.view(torch.uint8).fill_(0xFF)


class Call:
    """Attention of every set of requests in turn, layer by layer where there are several.

    Args:
        inputs: the requests.
        kernel: what attends.
    """

    def __init__(self, inputs: Inputs, kernel: Kernel = TRITON) -> None:
        self.inputs = inputs
        self.scale = inputs.layout.geometry.head_size**-0.5
        self.kernel = kernel.make(
            DecodeConfig(
                inputs.kv_cache, inputs.layout, inputs.group, inputs.basis, self.scale,
                len(inputs.lengths), inputs.leases.shape[1],
            )
        )  # fmt: skip
        self.batches = [
            DecodeBatch(inputs.block_table, rows, inputs.lengths, inputs.leases)
            for rows in inputs.query_rows
        ]
        self.output = torch.empty_like(inputs.queries[0])

    @property
    def steps(self) -> int:
        """Different inputs of :meth:`step`: every layer of every set."""
        return self.inputs.sets * self.inputs.layout.num_layers

    def poison(self) -> None:
        """Fill what the next step has to write with NaN."""
        poison(self.kernel)
        self.output.fill_(torch.nan)

    def step(self, index: int) -> None:
        """Attend with one set of requests in one layer."""
        of, layer = divmod(index, self.inputs.layout.num_layers)
        self.kernel.attend(self.inputs.queries[of], layer, self.batches[of], self.output)
