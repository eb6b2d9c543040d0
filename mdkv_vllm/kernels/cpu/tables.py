"""What the C++ kernels over leases need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.basis import Basis, hadamard
from mdkv_vllm.core.formats import full_format
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.kernels.cpu.formats import format_table


@dataclass(frozen=True)
class LeaseTables:
    """Arguments of an operator that do not change; build them once.

    Attributes:
        num_kv_heads: KV heads per layer.
        formats: their descriptors, and the tail's.
        basis_keys: per layer, float32 ``[kv_heads, rank, head_size]``; rank 0 without a basis.
        basis_values: same.
        hadamard: float32 ``[head_size, head_size]``.
        basis_first_page: where a prompt basis starts in a lease.
        basis_pages_per_head: pages it takes per layer and head.
        prompt_basis_rank: its rank; 0 where the basis is the calibrated one.
    """

    num_kv_heads: int
    formats: torch.Tensor
    basis_keys: tuple[torch.Tensor, ...]
    basis_values: tuple[torch.Tensor, ...]
    hadamard: torch.Tensor
    basis_first_page: int
    basis_pages_per_head: int
    prompt_basis_rank: int

    @classmethod
    def build(cls, layout: LeaseLayout, basis: Basis | None) -> LeaseTables:
        """Tables of a lease layout and, where formats use one, a calibrated basis."""
        head_size = layout.geometry.head_size
        if basis is None:
            basis = Basis.empty(layout.num_layers, layout.num_kv_heads, head_size)
        keys, values = basis.rows(torch.device("cpu"))
        return cls(
            num_kv_heads=layout.num_kv_heads,
            formats=format_table((*layout.formats.formats, full_format(layout.geometry))),
            basis_keys=keys,
            basis_values=values,
            hadamard=hadamard(head_size).contiguous(),
            basis_first_page=layout.basis_first_page,
            basis_pages_per_head=layout.basis_pages_per_head,
            prompt_basis_rank=layout.prompt_basis_rank,
        )
