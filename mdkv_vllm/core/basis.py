"""Bases: the spaces in which reduced tokens are stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Basis:
    """Principal bases of every KV head.

    Encoder and decoder are the same orthonormal matrix: ``k_low = k @ U_K``,
    ``q_low = q @ U_K``, ``v_low = v @ U_V``, ``o += o_low @ U_V^T`` (MixedDimKV section 3).
    Columns fall in importance, so a lower rank is a prefix of a higher one.

    Attributes:
        keys: float32 ``[layers, kv_heads, head_size, rank]``.
        values: float32, same shape.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns held."""
        return self.keys.shape[-1]

    def of_part(self, layers: slice, heads: slice) -> Basis:
        """The bases of some KV heads of some layers."""
        own = layers, heads
        return Basis(self.keys[own].contiguous(), self.values[own].contiguous())

    def to(self, device: torch.device) -> Basis:
        """The same bases on a device."""
        return Basis(self.keys.to(device), self.values.to(device))

    def rows(
        self, device: torch.device
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """As decode kernels read them: of K and of V, per layer ``[kv_heads, rank, head_size]``."""
        keys, values = (
            tuple(side.float().transpose(-1, -2).contiguous().to(device).unbind(0))
            for side in (self.keys, self.values)
        )
        return keys, values

    @classmethod
    def empty(cls, num_layers: int, num_kv_heads: int, head_size: int) -> Basis:
        """A basis of no directions."""
        nothing = torch.zeros(num_layers, num_kv_heads, head_size, 0)
        return cls(nothing, nothing)

    def truncate(self, rank: int) -> Basis:
        """Keep the first ``rank`` columns."""
        return Basis(self.keys[..., :rank].contiguous(), self.values[..., :rank].contiguous())


def principal_basis(second_moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading eigenvectors of uncentred second moments.

    The paper's basis: ``K^T K / N = U S U^T`` without subtracting the mean (arXiv
    2603.20616 section 3; methods note 1.1 a). Signs are fixed (the largest entry of a column
    is positive) so that equal inputs give equal bases.

    Args:
        second_moment: symmetric ``[..., head_size, head_size]``.
        rank: columns to return.

    Returns:
        float32 ``[..., head_size, rank]``, orthonormal columns, largest eigenvalue first.
    """
    _, vectors = torch.linalg.eigh(second_moment.float())
    leading = vectors.flip(-1)[..., :rank]
    pivot = leading.abs().argmax(dim=-2, keepdim=True)
    return leading * leading.gather(-2, pivot).sign()


@cache
def hadamard(size: int, device: torch.device | None = None) -> torch.Tensor:
    """A symmetric orthonormal Hadamard matrix, float32 ``[size, size]``.

    Sizes that are no power of two get the largest Sylvester block that divides them,
    repeated along the diagonal. A device gets it once.
    """
    if device is not None:
        return hadamard(size).to(device)
    block = size & -size
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return torch.block_diag(*([matrix / block**0.5] * (size // block)))
