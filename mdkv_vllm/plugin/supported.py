"""What the backend refuses, at start-up and by the name of the flag."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from mdkv_vllm.config import ConfigError

GPU_HEAD_SIZES = (64, 80, 96, 128, 256)
"""What the GPU kernels are compiled for and checked with."""


MAX_GPU_BLOCK_SIZE = 48
"""Tokens of a block on GPUs. A page is a block's share of one head, and kernels hold whole pages in
shared memory: of 64 tokens or more, too few fit a multiprocessor to keep its memory busy."""


def refuse_unsupported(vllm_config: VllmConfig, device_type: str) -> None:
    """Raise if the server asks for something that leases cannot carry yet.

    Args:
        vllm_config: what the server asks for.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: naming every offending flag.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    problems = []
    if model is not None and model.use_mla:
        problems.append("models with multi-head latent attention (MLA)")
    if model is not None and model.is_hybrid:
        problems.append("hybrid models with state-space layers")
    if model is not None and getattr(model.hf_text_config, "sliding_window", None):
        layer_types = getattr(model.hf_text_config, "layer_types", None) or ["sliding_attention"]
        uses = getattr(model.hf_text_config, "use_sliding_window", True)
        if uses and "sliding_attention" in layer_types:
            problems.append(
                "models with sliding-window layers (disable with --disable-sliding-window)"
            )
    if vllm_config.speculative_config is not None:
        problems.append("speculative decoding (--speculative-config)")
    if parallel.decode_context_parallel_size > 1:
        problems.append("context parallelism (--decode-context-parallel-size)")
    if parallel.prefill_context_parallel_size > 1:
        problems.append("context parallelism (--prefill-context-parallel-size)")
    if parallel.pipeline_parallel_size > 1:
        problems.append("pipeline parallelism (--pipeline-parallel-size)")
    if vllm_config.kv_transfer_config is not None:
        problems.append("KV connectors (--kv-transfer-config)")
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        problems.append(f"--kv-cache-dtype {cache.cache_dtype} (allowed: auto, float16, bfloat16)")
    if device_type == "cuda":
        problems += _not_on_gpus(vllm_config)
    if parallel.enable_dbo:
        problems.append("dual batch overlap (--enable-dbo)")
    if vllm_config.attention_config.backend_per_kind:
        problems.append("--attention-config backend_per_kind")
    if problems:
        raise ConfigError("--attention-backend mixeddim does not support " + "; ".join(problems))


def _not_on_gpus(vllm_config: VllmConfig) -> list[str]:
    """What runs on CPUs only."""
    model, cache_type = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    if model is None:
        return []
    problems = []
    if model.dtype not in (torch.float16, torch.bfloat16):
        problems.append(f"--dtype {model.dtype} on GPUs (allowed: float16, bfloat16)")
    if cache_type != "auto" and STR_DTYPE_TO_TORCH_DTYPE.get(cache_type) != model.dtype:
        problems.append(
            f"--kv-cache-dtype {cache_type} beside --dtype {model.dtype} on GPUs (allowed: auto)"
        )
    if not model.use_mla and model.get_head_size() not in GPU_HEAD_SIZES:
        sizes = ", ".join(map(str, GPU_HEAD_SIZES))
        problems.append(f"heads of {model.get_head_size()} dimensions on GPUs (allowed: {sizes})")
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size > MAX_GPU_BLOCK_SIZE:
        problems.append(
            f"--block-size {cache.block_size} on GPUs, whose kernels hold whole pages in shared "
            f"memory (allowed: up to {MAX_GPU_BLOCK_SIZE}; 16 unless told otherwise)"
        )
    return problems
