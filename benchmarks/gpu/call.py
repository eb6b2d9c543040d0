"""The kernel's call on the inputs of a load, as it is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdkv_vllm.triton_kernels.mixed_decode import DecodeTables, DecodeWorkspace, mixed_decode

from .inputs import Inputs

Decode = Callable[..., None]
"""Takes what :func:`mdkv_vllm.triton_kernels.mixed_decode.mixed_decode` takes."""

PROGRAMS_PER_MULTIPROCESSOR = 8


def programs(device: torch.device) -> int:
    """Programs that keep a device busy, as a server would ask for."""
    if device.type != "cuda":
        return 24
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count


class Call:
    """Attention of every set of requests in turn.

    Args:
        inputs: the requests.
        device: where they are.
        decode: the kernel.
    """

    def __init__(self, inputs: Inputs, device: torch.device, decode: Decode = mixed_decode) -> None:
        self.inputs, self.decode = inputs, decode
        self.tables = DecodeTables.build(inputs.layout, inputs.group, inputs.basis, device)
        self.workspace = DecodeWorkspace.allocate(
            self.tables.shape, len(inputs.lengths), device, programs(device)
        )
        self.output = torch.empty_like(inputs.queries[0])
        self.scale = inputs.layout.geometry.head_size**-0.5

    def poison(self) -> None:
        """Fill what the next step has to write with NaN."""
        workspace = self.workspace
        for floats in (self.output, workspace.rotated, workspace.part_out, workspace.part_lse):
            floats.fill_(torch.nan)

    def step(self, index: int) -> None:
        """Attend with one set of requests."""
        inputs = self.inputs
        self.decode(
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
