"""The worker on NVIDIA GPUs."""

from __future__ import annotations

import gc

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from mdkv_vllm.plugin.runtime import install_runtime
from mdkv_vllm.plugin.worker import MixedDimWorker, policy_of

# vLLM shows only what loggers below its own name say.
logger = init_logger(f"vllm.{__name__}")


class MixedDimCudaWorker(MixedDimWorker, Worker):
    """vLLM's GPU worker whose compressed prompts live in leases."""

    def determine_available_memory(self) -> int:
        """Bytes for the cache: what vLLM finds, less what compression needs beyond a step.

        vLLM rehearses the model and its CUDA graphs over a cache of a few blocks; so do we. What
        our runtime holds is then seen by vLLM as held. What compressing the longest prompt takes
        for a moment may lie where a step's activations lie at other times.
        """
        policy = policy_of(list(set(self.get_kv_cache_spec().values())))
        size = policy.geometry
        arena = torch.zeros(
            (2, policy.layout.pages_per_block, size.block_size, 2 * size.head_size),
            dtype=size.dtype,
            device=self.device,
        )
        runtime = self._make_runtime(policy, arena)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        runtime.rehearse(self.vllm_config.model_config.max_model_len - 1)
        passing = torch.cuda.max_memory_allocated() - held
        torch.cuda.empty_cache()
        install_runtime(runtime)
        available = super().determine_available_memory()
        install_runtime(None)
        del runtime, arena
        gc.collect()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available  # the user's own word on the cache
        beyond = max(0, passing - self.peak_activation_memory)
        logger.info(
            "mixeddim: compressing a prompt of %d tokens takes %.2f GiB for a moment, %.2f GiB of "
            "it beyond what a step of the model takes, and left out of the cache",
            self.vllm_config.model_config.max_model_len - 1,
            passing / 2**30,
            beyond / 2**30,
        )
        return available - beyond
