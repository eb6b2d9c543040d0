"""Which kernels serve a device, by the setting ``kernels``."""

from __future__ import annotations

import os

import torch

from mdkv_vllm.config import ConfigError
from mdkv_vllm.core.kernels import CompressionKernels
from mdkv_vllm.kernels.interface import (
    DecodeConfig,
    DecodeKernel,
    LeaseReader,
    MakeDecode,
    MakeReader,
    ReadConfig,
)


def _reference(config: DecodeConfig) -> DecodeKernel:
    from mdkv_vllm.kernels.reference import ReferenceDecode

    return ReferenceDecode(config)


def _cpu(config: DecodeConfig) -> DecodeKernel:
    from mdkv_vllm.kernels.cpu.decode import CpuDecode

    return CpuDecode(config)


def _triton(config: DecodeConfig) -> DecodeKernel:
    from mdkv_vllm.kernels.triton.decode import TritonDecode

    return TritonDecode(config)


def _cuda(config: DecodeConfig) -> DecodeKernel:
    from mdkv_vllm.kernels.cuda.decode import CudaDecode

    return CudaDecode(config)


DECODE: dict[str, MakeDecode] = {
    "reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda,
}  # fmt: skip
"""Every decode kernel. What it needs is imported when it is made."""


def _cpu_reader(config: ReadConfig) -> LeaseReader:
    from mdkv_vllm.kernels.cpu.read import CpuReader

    return CpuReader(config)


def _triton_reader(config: ReadConfig) -> LeaseReader:
    from mdkv_vllm.kernels.triton.read import TritonReader

    return TritonReader(config)


READERS: dict[str, MakeReader] = {"cpu": _cpu_reader, "triton": _triton_reader}
"""Every reader of leases."""


def lease_reader(config: ReadConfig) -> LeaseReader:
    """Make a device's reader of leases: there is one implementation for each."""
    return READERS["cpu" if config.kv_cache.device.type == "cpu" else "triton"](config)


def compression_kernels(requested: str, device: torch.device) -> CompressionKernels:
    """Make a device's compression kernels: there is one implementation for each.

    Args:
        requested: the setting ``kernels``; on a CPU ``triton`` has everything interpreted.
        device: where the cache is.
    """
    if device.type == "cpu" and requested != "triton":
        from mdkv_vllm.kernels.cpu.compress import CpuKernels

        return CpuKernels()
    from mdkv_vllm.kernels.triton.compress import TritonKernels

    return TritonKernels()


def decode_kernels(requested: str, device: torch.device) -> tuple[str, ...]:
    """Kernels that may decode on a device, the default first.

    Args:
        requested: the setting ``kernels``.
        device: where the cache is.

    Returns:
        Keys of :data:`DECODE`; more than one only for ``autotune``.

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
    from mdkv_vllm.kernels.cuda.library import why_not

    missing = why_not()
    if requested == "cuda":
        if missing:
            raise ConfigError(f"mixeddim.kernels is 'cuda', but {missing}")
        return (requested,)
    if missing:
        return ("triton",)
    return ("cuda", "triton") if requested == "autotune" else ("cuda",)


def decode_kernel(requested: str, config: DecodeConfig) -> tuple[str, DecodeKernel]:
    """Make the decode kernel that the setting ``kernels`` stands for.

    Args:
        requested: ``auto``, ``autotune``, ``cpu``, ``triton`` or ``cuda``.
        config: the model.

    Returns:
        Its name, with what timing two showed, and the kernel.

    Raises:
        ConfigError: what is requested does not run where the cache is.
    """
    names = decode_kernels(requested, config.kv_cache.device)
    if len(names) == 1:
        return names[0], DECODE[names[0]](config)
    from mdkv_vllm.kernels.autotune import measure

    makers = tuple((name, DECODE[name]) for name in names)
    times = measure(config.layout, config.group, config.kv_cache.device, makers)
    first, second = sorted(names, key=times.__getitem__)
    ratio = times[second] / times[first]
    return f"{first} ({ratio:.2f} x as fast as {second} here)", DECODE[first](config)
