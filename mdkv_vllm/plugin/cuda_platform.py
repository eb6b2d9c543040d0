"""vLLM's CUDA platform, taught to accept the backend."""

from __future__ import annotations

from typing import ClassVar

from vllm.platforms.cuda import CudaPlatform

from mdkv_vllm.plugin.platform import MixedDimPlatform


class MixedDimCudaPlatform(MixedDimPlatform, CudaPlatform):
    """The CUDA platform plus ``--attention-backend mixeddim``."""

    worker_class: ClassVar[str] = "mdkv_vllm.plugin.cuda_worker.MixedDimCudaWorker"
    # Of vLLM's, the one that looks at nothing outside of a window: what lies there may be a lease.
    windowed_backend: ClassVar[str] = (
        "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    )
