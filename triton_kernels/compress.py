"""Compression with the GPU kernels. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.loss import Candidate

from .allocate import allocate
from .pack import pack
from .project import project
from .quantise import round_trip
from .window_scores import loss_sums


class TritonKernels:
    """:class:`mdkv_vllm.core.kernels.CompressionKernels` in Triton.

    Tensors are on the device, of any float type. The objective and the bound of an
    allocation are tensors of one element there.
    """

    layers_at_once = 64
    """All of most models': their losses take less memory than one layer of their prompt."""

    def rotate(self, vectors: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
        """See :class:`mdkv_vllm.core.kernels.CompressionKernels`."""
        return project(vectors, encoder)

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`mdkv_vllm.core.kernels.CompressionKernels`."""
        return round_trip(keys, values, bits)

    def loss_sums(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        candidates: Sequence[Candidate],
        span: int,
        scale: float,
        variant: str,
    ) -> torch.Tensor:
        """See :class:`mdkv_vllm.core.kernels.CompressionKernels`; writes out no score matrix."""
        return loss_sums(queries, keys, candidates, span, scale, variant)

    def allocate(
        self,
        losses: Sequence[torch.Tensor],
        formats: FormatSet,
        budgets: Sequence[Sequence[int]],
    ) -> list[Allocation]:
        """See :func:`mdkv_vllm.triton_kernels.allocate.allocate`, near the reference's optimum."""
        return allocate(losses, formats, budgets)

    def pack(
        self,
        vectors: Sequence[tuple[torch.Tensor, torch.Tensor]],
        formats: FormatSet,
        choice: torch.Tensor,
        geometry: PageGeometry,
        pages: torch.Tensor,
        first_page: torch.Tensor,
    ) -> None:
        """See :class:`mdkv_vllm.core.kernels.CompressionKernels`."""
        pack(vectors, formats, choice, geometry, pages, first_page)
