"""Which decode kernel serves a cache: one object per implementation, all called alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import torch

from mdkv_vllm.config import ConfigError
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.layout import LeaseLayout


@dataclass(frozen=True)
class DecodeSetting:
    """What every decode kernel of a model is made from.

    Attributes:
        arena: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        layout: what leases look like.
        group: query heads per KV head.
        basis: the calibrated basis, None where none is used or each prompt has its own.
        scale: factor of the attention scores.
        max_queries: queries of one launch at most; larger batches take several.
    """

    arena: torch.Tensor
    layout: LeaseLayout
    group: int
    basis: Basis | None
    scale: float
    max_queries: int


class DecodeKernel(Protocol):
    """Attention of single-token queries over leases and full-dimension tokens."""

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        block_table: torch.Tensor,
        query_rows: torch.Tensor,
        lengths: torch.Tensor,
        leases: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attend in one layer; see :func:`mdkv_vllm.ops.cpu.mixed_decode` for the arguments."""


class CpuDecode:
    """:class:`DecodeKernel` in C++."""

    def __init__(self, setting: DecodeSetting) -> None:
        from mdkv_vllm.ops import cpu

        self._setting = setting
        self._kernel = cpu.mixed_decode
        self._tables = cpu.DecodeTables.build(setting.layout, setting.basis)

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        block_table: torch.Tensor,
        query_rows: torch.Tensor,
        lengths: torch.Tensor,
        leases: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See :class:`DecodeKernel`."""
        self._kernel(
            query,
            self._setting.arena,
            layer,
            self._tables,
            block_table,
            query_rows,
            lengths,
            leases,
            self._setting.scale,
            output,
        )


class TritonDecode:
    """:class:`DecodeKernel` in Triton."""

    def __init__(self, setting: DecodeSetting) -> None:
        from mdkv_vllm.triton_kernels import mixed_decode as kernel

        device = setting.arena.device
        self._setting = setting
        self._kernel = kernel.mixed_decode
        self._tables = kernel.DecodeTables.build(
            setting.layout, setting.group, setting.basis, device
        )
        self._workspace = kernel.DecodeWorkspace.allocate(
            self._tables.shape, setting.max_queries, device, kernel.programs_of(device)
        )

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        block_table: torch.Tensor,
        query_rows: torch.Tensor,
        lengths: torch.Tensor,
        leases: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See :class:`DecodeKernel`; nothing waits for the device."""
        for start in range(0, query.shape[0], self._setting.max_queries):
            some = slice(start, start + self._setting.max_queries)
            self._kernel(
                query[some],
                self._setting.arena,
                layer,
                self._tables,
                block_table,
                query_rows[some],
                lengths[some],
                leases,
                self._setting.scale,
                output[some],
                self._workspace,
            )


def kernels_for(asked: str, device: torch.device) -> str:
    """Which kernels a device gets: ``cpu``, ``triton`` or ``cuda``.

    Args:
        asked: the setting ``kernels``.
        device: where the cache is.

    Raises:
        ConfigError: what is asked for does not run on the device.
    """
    if device.type == "cpu":
        if asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return asked
        if asked not in ("auto", "cpu"):
            raise ConfigError(
                f"mixeddim.kernels is {asked!r}, but the model runs on the CPU; allowed there are "
                "auto and cpu (and triton, interpreted and slow, with TRITON_INTERPRET=1)"
            )
        return "cpu"
    if asked == "cpu":
        raise ConfigError(
            f"mixeddim.kernels is 'cpu', but the model runs on {device}; allowed there are "
            "auto, triton and cuda"
        )
    if asked == "cuda":
        raise ConfigError("mixeddim.kernels is 'cuda', but the CUDA kernels are not built")
    return "triton"


def decode_kernel(kernels: str, setting: DecodeSetting) -> DecodeKernel:
    """Make the decode kernel of that name, as :func:`kernels_for` gives it."""
    return CpuDecode(setting) if kernels == "cpu" else TritonDecode(setting)
