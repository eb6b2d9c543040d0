"""vLLM's CUDA platform, taught to accept the backend."""

from __future__ import annotations

from typing import ClassVar

from vllm.platforms.cuda import CudaPlatform

from mdkv_vllm.plugin.platform import MixedDimPlatform


class MixedDimCudaPlatform(MixedDimPlatform, CudaPlatform):
    """The CUDA platform plus ``--attention-backend mixeddim``."""

    worker_class: ClassVar[str] = "mdkv_vllm.plugin.cuda_worker.MixedDimCudaWorker"
