"""Compression with the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdkv_vllm.core.allocate import Allocation, allocate_layers
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.kernels import LayerByLayer
from mdkv_vllm.core.loss import Candidate
from mdkv_vllm.core.losses import Loss
from mdkv_vllm.kernels.cpu.formats import format_table


class CpuKernels(LayerByLayer):
    """:class:`mdkv_vllm.core.kernels.LayerKernels` and ``CompressionKernels`` in C++.

    The result does not depend on the number of threads.
    """

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`mdkv_vllm.core.kernels.LayerKernels`."""
        return torch.ops.mdkv.round_trip(keys, values, bits)

    def loss_sums(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        candidates: Sequence[Candidate],
        span: int,
        scale: float,
        loss: Loss,
    ) -> torch.Tensor:
        """See :class:`mdkv_vllm.core.kernels.LayerKernels`; writes out no score matrix."""
        return torch.ops.mdkv.loss_sums(
            queries.flatten(1, 2),
            keys,
            [c.queries for c in candidates],
            [c.keys for c in candidates],
            span,
            queries.shape[2],
            scale,
            loss.joint,
        )

    def allocate(
        self,
        losses: Sequence[torch.Tensor],
        formats: FormatSet,
        budgets: Sequence[Sequence[int]],
    ) -> list[Allocation]:
        """See :class:`mdkv_vllm.core.kernels.CompressionKernels`."""
        return allocate_layers(self._allocate_pool, losses, formats, budgets)

    def _allocate_pool(
        self, losses: torch.Tensor, formats: FormatSet, num_pages: int
    ) -> Allocation:
        capacity = formats.capacity(losses.device)
        return Allocation(
            *torch.ops.mdkv.allocate(losses.contiguous(), capacity, formats.drop, num_pages)
        )

    def pack(
        self,
        vectors: Sequence[tuple[torch.Tensor, torch.Tensor]],
        formats: FormatSet,
        choice: torch.Tensor,
        geometry: PageGeometry,
        pages: torch.Tensor,
        first_page: torch.Tensor,
    ) -> None:
        """See :class:`mdkv_vllm.core.kernels.LayerKernels`."""
        torch.ops.mdkv.pack_layer(
            [keys for keys, _ in vectors],
            [values for _, values in vectors],
            format_table(formats.formats),
            choice,
            pages[int(first_page) :],
            geometry.dtype,
        )
