"""Leases read back on a GPU, in one launch per layer.

Bytes: every page of the sources once (twice where heads have more than 128 dimensions), and each
token's keys and values written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.basis import hadamard
from mdkv_vllm.kernels.gpu_decode import basis_in_use
from mdkv_vllm.kernels.interface import SOURCE_FIELDS, ReadConfig, Sources

from .elements import element_type
from .read_kernels import read_sources
from .shapes import DecodeShape

BLOCKS_PER_PROGRAM = 8
"""Blocks of a source for which there is a program; a lease's lists have about a page per block."""
MAX_OUT_DIMS = 128


@dataclass(frozen=True, repr=False)
class ReadShape(DecodeShape):
    """What reading is compiled for: a group of 1, for there are no queries."""

    @property
    def out_dims(self) -> int:
        """Dimensions of the head that are made at a time."""
        return min(self.padded_head, MAX_OUT_DIMS)

    @property
    def out_blocks(self) -> int:
        """Times that takes."""
        return self.padded_head // self.out_dims

    @property
    def num_warps(self) -> int:
        """Warps of a program: as many as hold a block of directions in registers."""
        return 8 if self.padded_head > MAX_OUT_DIMS else 4

    @property
    def value_tokens(self) -> int:
        """Tokens whose values are read at a time."""
        return 32

    @property
    def norms(self) -> tuple[float, ...]:
        """The factor of every part's directions."""
        hadamard_norm = 2.0 ** (-self.hadamard_steps / 2)
        return tuple(hadamard_norm if part.in_hadamard else 1.0 for part in self.parts)


class TritonReader:
    """:class:`mdkv_vllm.kernels.interface.LeaseReader` in Triton.

    Nothing is checked on the device: ids, lengths and targets have to be right.

    Args:
        config: the model.

    Raises:
        ValueError: the basis has fewer directions than a format reads.
    """

    def __init__(self, config: ReadConfig) -> None:
        device, layout = config.kv_cache.device, config.layout
        basis, rank = basis_in_use(config)
        self._basis_keys, self._basis_values = basis.rows(device)
        self._shape = ReadShape(layout, 1, rank)
        self._pages = config.kv_cache.view(torch.uint8)
        matrix = hadamard(layout.geometry.head_size)
        wide = layout.geometry.dtype == torch.float32
        self._hadamard = matrix.sign().to(torch.float32 if wide else torch.float16).to(device)

    def read(
        self,
        layer: int,
        sources: Sources,
        targets: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See :class:`mdkv_vllm.kernels.interface.LeaseReader`."""
        splits = -(-sources.most_blocks // BLOCKS_PER_PROGRAM)
        read_sources[(splits, len(sources.fields))](
            self._pages,
            sources.block_table,
            sources.block_table.stride(0),
            sources.fields,
            targets,
            layer,
            self._hadamard,
            self._basis_keys[layer],
            self._basis_values[layer],
            keys.view(torch.uint8),
            values.view(torch.uint8),
            SHAPE=self._shape,
            FIELDS=SOURCE_FIELDS,
            OUT=element_type(keys.dtype),
            num_warps=self._shape.num_warps,
        )
