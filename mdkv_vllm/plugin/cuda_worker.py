"""The worker on NVIDIA GPUs."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from mdkv_vllm.plugin.worker import MixedDimWorker


class MixedDimCudaWorker(MixedDimWorker, Worker):
    """vLLM's GPU worker whose compressed prompts live in leases."""
