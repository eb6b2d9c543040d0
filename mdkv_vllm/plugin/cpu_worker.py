"""The worker on CPUs."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from mdkv_vllm.plugin.compat import make_stage_input
from mdkv_vllm.plugin.worker import MixedDimWorker


class MixedDimCpuWorker(MixedDimWorker, CPUWorker):
    """vLLM's CPU worker whose compressed prompts live in leases."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """As vLLM does it; then a pipeline stage has what it needs for its first step."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        make_stage_input(self.model_runner)
