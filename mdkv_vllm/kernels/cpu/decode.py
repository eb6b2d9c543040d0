"""Decode attention in C++."""

from __future__ import annotations

import torch

from mdkv_vllm.kernels.cpu.tables import LeaseTables
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig


class CpuDecode:
    """:class:`mdkv_vllm.kernels.interface.DecodeKernel` on a CPU.

    Args:
        config: the model; batches of any size are taken at once.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._tables = LeaseTables.build(config.layout, config.basis)

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
        recent: torch.Tensor | None = None,
    ) -> None:
        """See :class:`mdkv_vllm.kernels.interface.DecodeKernel`.

        Raises:
            RuntimeError: an argument is of the wrong type or shape, or an id out of range.
        """
        if recent is not None:
            recent.copy_(query)
        tables = self._tables
        torch.ops.mdkv.mixed_decode.default(
            query,
            self._config.kv_cache,
            layer,
            tables.num_kv_heads,
            batch.block_table,
            batch.query_rows,
            batch.lengths,
            batch.leases,
            tables.formats,
            tables.basis_keys[layer],
            tables.basis_values[layer],
            tables.hadamard,
            tables.basis_first_page,
            tables.basis_pages_per_head,
            tables.prompt_basis_rank,
            self._config.scale,
            output,
            lse,
        )

    def scratch(self) -> tuple[torch.Tensor, ...]:
        """None is kept."""
        return ()
