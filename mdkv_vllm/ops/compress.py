"""Which compression kernels serve a device."""

from __future__ import annotations

import torch

from mdkv_vllm.core.kernels import CompressionKernels


def compression_kernels(requested: str, device: torch.device) -> CompressionKernels:
    """Make a device's compression kernels: there is one implementation for each.

    Args:
        requested: the setting ``kernels``; on a CPU ``triton`` has everything interpreted.
        device: where the cache is.
    """
    if device.type == "cpu" and requested != "triton":
        from mdkv_vllm.ops.cpu_compress import CpuKernels

        return CpuKernels()
    from mdkv_vllm.triton_kernels.compress import TritonKernels

    return TritonKernels()
