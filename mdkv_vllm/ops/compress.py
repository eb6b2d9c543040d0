"""Which compression kernels serve a device."""

from __future__ import annotations

from mdkv_vllm.core.kernels import CompressionKernels


def compression_kernels(kernels: str) -> CompressionKernels:
    """Make the compression kernels of that name, as :func:`mdkv_vllm.ops.decode.kernels_for`."""
    if kernels == "cpu":
        from mdkv_vllm.ops.cpu_compress import CpuKernels

        return CpuKernels()
    from mdkv_vllm.triton_kernels.compress import TritonKernels

    return TritonKernels()
