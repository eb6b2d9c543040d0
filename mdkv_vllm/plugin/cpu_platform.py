"""vLLM's CPU platform, taught to accept the backend."""

from __future__ import annotations

from typing import ClassVar

from vllm.platforms.cpu import CpuPlatform

from mdkv_vllm.plugin.platform import MixedDimPlatform


class MixedDimCpuPlatform(MixedDimPlatform, CpuPlatform):
    """The CPU platform plus ``--attention-backend mixeddim``."""

    worker_class: ClassVar[str] = "mdkv_vllm.plugin.cpu_worker.MixedDimCpuWorker"
    windowed_backend: ClassVar[str] = "mdkv_vllm.plugin.cpu_windowed.WindowedCpuBackend"
