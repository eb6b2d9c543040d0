"""Decode attention in float64, behind the interface of the kernels that are tested against it."""

from __future__ import annotations

import torch

from mdkv_vllm.core.reference import mixed_decode
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeSetting


class ReferenceDecode:
    """:class:`mdkv_vllm.kernels.interface.DecodeKernel` in plain torch, slow.

    Args:
        setting: the model.
    """

    def __init__(self, setting: DecodeSetting) -> None:
        self._setting = setting

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
        setting = self._setting
        result, log_sums = mixed_decode(
            query.double(),
            setting.kv_cache,
            layer,
            setting.layout,
            batch.block_table,
            batch.query_rows,
            batch.lengths,
            batch.leases,
            setting.basis,
            setting.scale,
        )
        output.copy_(result)
        if lse is not None:
            lse.copy_(log_sums)
        if recent is not None:
            recent.copy_(query)

    def scratch(self) -> tuple[torch.Tensor, ...]:
        """None is kept."""
        return ()
