"""The worker on CPUs."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from mdkv_vllm.plugin.worker import MixedDimWorker


class MixedDimCpuWorker(MixedDimWorker, CPUWorker):
    """vLLM's CPU worker whose compressed prompts live in leases."""
