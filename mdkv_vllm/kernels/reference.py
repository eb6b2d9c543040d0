"""Decode attention in float64, behind the interface of the kernels that are tested against it."""

from __future__ import annotations

import torch

from mdkv_vllm.core.reference import mixed_decode
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig


class ReferenceDecode:
    """:class:`mdkv_vllm.kernels.interface.DecodeKernel` in plain torch, slow.

    Args:
        config: the model.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
        recent: torch.Tensor | None = None,
    ) -> None:
        """See :class:`mdkv_vllm.kernels.interface.DecodeKernel`."""
        config = self._config
        result, log_sums = mixed_decode(
            query.double(),
            config.kv_cache,
            layer,
            config.layout,
            batch.block_table,
            batch.query_rows,
            batch.lengths,
            batch.leases,
            config.basis,
            config.scale,
        )
        output.copy_(result)
        if lse is not None:
            lse.copy_(log_sums)
        if recent is not None:
            recent.copy_(query)

    def scratch(self) -> tuple[torch.Tensor, ...]:
        """None is kept."""
        return ()
