"""The worker on NVIDIA GPUs."""

from __future__ import annotations

import gc

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from mdkv_vllm.plugin.compat import step_activations
from mdkv_vllm.plugin.kv_cache import attention_layers
from mdkv_vllm.plugin.prefill.head_calls import scratch_bytes
from mdkv_vllm.plugin.worker import MixedDimWorker, policy_of
from mdkv_vllm.plugin.worker_runtime.runtime import Runtime, install_runtime
from mdkv_vllm.policy import Policy

# vLLM shows only what loggers below its own name say.
logger = init_logger(f"vllm.{__name__}")


class MixedDimCudaWorker(MixedDimWorker, Worker):
    """vLLM's GPU worker whose compressed prompts live in leases."""

    def determine_available_memory(self) -> int:
        """Bytes for the cache: what vLLM finds, less what leases need beyond a step.

        vLLM warms up the model and its CUDA graphs over a cache of a few blocks; so do we. What
        our runtime holds is then seen by vLLM as held. What compressing the longest prompt takes
        for a moment may lie where a step's activations lie at other times; what reading leases back
        takes, for chunks of prompts behind them, lies beside these.
        """
        requested = self.cache_config.kv_cache_memory_bytes
        specs = self.get_kv_cache_spec().values()
        policy = policy_of(specs, len(attention_layers(self.vllm_config)))
        size = policy.geometry
        kv_cache = torch.zeros(
            (2, policy.layout.pages_per_block, size.block_size, 2 * size.head_size),
            dtype=size.dtype,
            device=self.device,
        )
        runtime = self._make_runtime(policy, kv_cache)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        tokens = self._warm_up(runtime)
        passing = torch.cuda.max_memory_allocated() - held
        windows = runtime.window_bytes
        torch.cuda.empty_cache()
        install_runtime(runtime)
        available = super().determine_available_memory()
        install_runtime(None)
        del runtime, kv_cache
        gc.collect()
        if requested is not None:
            return available  # the user's own word on the cache
        graphs = envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS
        beyond = max(0, passing - step_activations(self, graphs)) + windows
        scratch = self._scratch_bytes(policy)
        logger.info(
            "mixeddim: compressing a prompt of %d tokens takes %.2f GiB for a moment, %.2f GiB of "
            "it (with window queries) beyond a step of the model, reading leases back for chunks "
            "behind them %.2f GiB; so much is left out of the cache",
            tokens,
            passing / 2**30,
            beyond / 2**30,
            scratch / 2**30,
        )
        return available - beyond - scratch

    def _scratch_bytes(self, policy: Policy) -> int:
        """Bytes that attention behind leases takes at most for a moment."""
        model, parallel = self.model_config, self.parallel_config
        group = model.get_num_attention_heads(parallel) // policy.num_kv_heads
        tokens = self.scheduler_config.max_num_batched_tokens
        return scratch_bytes(policy.layout, model.dtype, group, model.max_model_len, tokens)

    def _warm_up(self, runtime: Runtime) -> int:
        """Warm up with the longest prompt that there is memory for; its length.

        vLLM may yet shorten what the model allows, and says so itself where nothing fits.
        """
        tokens = self.vllm_config.model_config.max_model_len - 1
        while True:
            try:
                runtime.warm_up(tokens)
            except torch.OutOfMemoryError:
                if tokens < runtime.policy.config.min_prompt_tokens:
                    raise
                tokens //= 2
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            else:
                return tokens
