"""Which decode kernel serves a cache: one object per implementation, all called alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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
        recent: torch.Tensor | None = None,
    ) -> None:
        """Attend in one layer; see :func:`mdkv_vllm.ops.cpu.mixed_decode` for the arguments.

        ``recent``, where given, is written: the queries as they are, contiguous.
        """


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
        recent: torch.Tensor | None = None,
    ) -> None:
        """See :class:`DecodeKernel`."""
        if recent is not None:
            recent.copy_(query)
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


class GpuDecode:
    """:class:`DecodeKernel` in Triton or CUDA, whose modules look alike.

    Args:
        setting: the model.
        implementation: :mod:`mdkv_vllm.triton_kernels.mixed_decode` or :mod:`mdkv_vllm.ops.cuda`.
    """

    def __init__(self, setting: DecodeSetting, implementation: Any) -> None:  # noqa: ANN401
        device = setting.arena.device
        self._setting = setting
        self._kernel = implementation.mixed_decode
        self._tables = implementation.DecodeTables.build(
            setting.layout, setting.group, setting.basis, device
        )
        self._workspace = implementation.DecodeWorkspace.allocate(
            self._tables.shape, setting.max_queries, device
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
        recent: torch.Tensor | None = None,
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
                recent=None if recent is None else recent[some],
            )


def _triton(setting: DecodeSetting) -> DecodeKernel:
    from mdkv_vllm.triton_kernels import mixed_decode

    return GpuDecode(setting, mixed_decode)


def _cuda(setting: DecodeSetting) -> DecodeKernel:
    from mdkv_vllm.ops import cuda

    return GpuDecode(setting, cuda)


MakeDecode = Callable[[DecodeSetting], DecodeKernel]
MAKERS: dict[str, MakeDecode] = {"cpu": CpuDecode, "triton": _triton, "cuda": _cuda}


def decode_kernels(requested: str, device: torch.device) -> tuple[str, ...]:
    """Kernels that may decode on a device, the default first.

    Args:
        requested: the setting ``kernels``.
        device: where the cache is.

    Returns:
        Keys of :data:`MAKERS`; more than one only for ``autotune``.

    Raises:
        ConfigError: what is requested does not run on the device.
    """
    if device.type == "cpu":
        if requested == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return (requested,)
        if requested not in ("auto", "cpu"):
            raise ConfigError(
                f"mixeddim.kernels is {requested!r}, but the model runs on the CPU; allowed there "
                "are auto and cpu (and triton, interpreted and slow, with TRITON_INTERPRET=1)"
            )
        return ("cpu",)
    if requested == "cpu":
        raise ConfigError(
            f"mixeddim.kernels is 'cpu', but the model runs on {device}; allowed there are "
            "auto, autotune, triton and cuda"
        )
    if requested == "triton":
        return (requested,)
    from mdkv_vllm.ops.cuda import why_not

    missing = why_not()
    if requested == "cuda":
        if missing:
            raise ConfigError(f"mixeddim.kernels is 'cuda', but {missing}")
        return (requested,)
    if missing:
        return ("triton",)
    return ("cuda", "triton") if requested == "autotune" else ("cuda",)


def decode_kernel(requested: str, setting: DecodeSetting) -> tuple[str, DecodeKernel]:
    """Make the decode kernel that the setting ``kernels`` stands for.

    Args:
        requested: ``auto``, ``autotune``, ``cpu``, ``triton`` or ``cuda``.
        setting: the model.

    Returns:
        Its name, with what timing two showed, and the kernel.

    Raises:
        ConfigError: what is requested does not run where the cache is.
    """
    names = decode_kernels(requested, setting.arena.device)
    if len(names) == 1:
        return names[0], MAKERS[names[0]](setting)
    from mdkv_vllm.ops.autotune import measure

    makers = tuple((name, MAKERS[name]) for name in names)
    times = measure(setting.layout, setting.group, setting.arena.device, makers)
    first, second = sorted(names, key=times.__getitem__)
    ratio = times[second] / times[first]
    return f"{first} ({ratio:.2f} x as fast as {second} here)", MAKERS[first](setting)
