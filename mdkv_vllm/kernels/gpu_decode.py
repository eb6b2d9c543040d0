"""What decode kernels of GPUs have in common: memory for a largest batch, launches within it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig, ReadConfig


class GpuDecode(ABC):
    """:class:`mdkv_vllm.kernels.interface.DecodeKernel` of launches of limited size.

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
        """See :class:`mdkv_vllm.kernels.interface.DecodeKernel`.

        Raises:
            ValueError: something has not a row per query, or rows have not as many leases as the
                kernel was made for.
        """
        for name, tensor in {"output": output, "lse": lse, "recent": recent}.items():
            if tensor is not None and len(tensor) != len(query):
                raise ValueError(f"{name}: {len(tensor)} rows for {len(query)} queries")
        leases = batch.leases.shape
        if leases[1:] != (self._config.max_leases, 2):
            raise ValueError(
                f"leases: {list(leases)}; expected [rows, {self._config.max_leases}, 2]"
            )
        most = self._config.max_queries
        if 0 < len(query) <= most:  # nearly always, for every layer of every step
            self._launch(query, layer, batch, output, lse, recent)
            return
        for start in range(0, len(query), most):
            some = slice(start, start + most)
            self._launch(
                query[some],
                layer,
                batch.queries(some),
                output[some],
                None if lse is None else lse[some],
                None if recent is None else recent[some],
            )

    @abstractmethod
    def _launch(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        recent: torch.Tensor | None,
    ) -> None:
        """:meth:`attend` for at most ``max_queries`` queries."""

    @abstractmethod
    def scratch(self) -> Sequence[torch.Tensor]:
        """See :class:`mdkv_vllm.kernels.interface.DecodeKernel`."""


def basis_in_use(config: DecodeConfig | ReadConfig) -> tuple[Basis, int]:
    """The calibrated basis, or an empty one, and the rank that formats may read.

    Returns:
        The basis and its rank, or the rank of the prompts' own; 0 where no format uses one.

    Raises:
        ValueError: the basis has fewer directions than a format reads.
    """
    layout, basis = config.layout, config.basis
    if layout.prompt_basis_rank or basis is None:
        basis = Basis.empty(layout.num_layers, layout.num_kv_heads, layout.geometry.head_size)
    rank = layout.prompt_basis_rank or basis.rank
    if rank < layout.formats.basis_rank:
        raise ValueError(
            f"the basis has {rank} directions; formats read {layout.formats.basis_rank}"
        )
    return basis, rank if layout.formats.uses_basis else 0
