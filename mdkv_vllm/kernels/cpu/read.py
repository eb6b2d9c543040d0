"""Leases read back in C++."""

from __future__ import annotations

import torch

from mdkv_vllm.kernels.cpu.tables import LeaseTables
from mdkv_vllm.kernels.interface import ReadConfig, Sources


class CpuReader:
    """:class:`mdkv_vllm.kernels.interface.LeaseReader` on a CPU.

    Args:
        config: the model.
    """

    def __init__(self, config: ReadConfig) -> None:
        self._kv_cache = config.kv_cache
        self._tables = LeaseTables.build(config.layout, config.basis)

    def read(
        self,
        layer: int,
        sources: Sources,
        targets: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See :class:`mdkv_vllm.kernels.interface.LeaseReader`.

        Raises:
            RuntimeError: an argument is of the wrong type or shape, or an id out of range.
        """
        tables = self._tables
        torch.ops.mdkv.read_leases.default(
            self._kv_cache,
            layer,
            tables.num_kv_heads,
            sources.block_table,
            sources.fields,
            targets,
            tables.formats,
            tables.basis_keys[layer],
            tables.basis_values[layer],
            tables.hadamard,
            tables.basis_first_page,
            tables.basis_pages_per_head,
            tables.prompt_basis_rank,
            keys,
            values,
        )
