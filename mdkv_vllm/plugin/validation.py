"""Every refusal of the plugin, by the name of the flag or field: at start-up where it can be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from mdkv_vllm.config import REQUEST_BUDGET, Budget, ConfigError, MixedDimConfig, request_budget
from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES

CACHELESS_DRAFTS = ("ngram", "ngram_gpu", "suffix", "medusa", "custom_class")
"""Methods of speculative decoding whose drafts come from no layers with a KV cache."""
MAX_GPU_BLOCK_SIZE = 48
"""Tokens of a block on GPUs. A page is a block's share of one head, and kernels hold whole pages in
shared memory: of 64 tokens or more, too few fit a multiprocessor to keep its memory busy."""


def refuse_unsupported(vllm_config: VllmConfig, device_type: str, config: MixedDimConfig) -> None:
    """Raise if the server asks for something that leases cannot carry yet.

    Args:
        vllm_config: what the server asks for.
        device_type: ``cpu`` or ``cuda``.
        config: the settings.

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
    if model is not None and model.attention_chunk_size is not None:
        problems.append("models with chunked attention (Llama 4)")
    problems += _of_drafts(vllm_config)
    if parallel.decode_context_parallel_size > 1:
        problems.append("context parallelism (--decode-context-parallel-size)")
    if parallel.prefill_context_parallel_size > 1:
        problems.append("context parallelism (--prefill-context-parallel-size)")
    if vllm_config.kv_transfer_config is not None:
        problems.append("KV connectors (--kv-transfer-config)")
    if _sends_events(vllm_config) and model is not None and _shares(config, model):
        problems.append(
            "KV cache events (--kv-events-config), which know no leases, unless "
            "mixeddim.shared_prefixes is 'full'"
        )
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


def _of_drafts(vllm_config: VllmConfig) -> list[str]:
    """What is asked of speculative decoding that leases cannot carry."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return []
    if drafts.method not in CACHELESS_DRAFTS:
        allowed = ", ".join(CACHELESS_DRAFTS)
        return [
            f"--speculative-config with method {drafts.method}, whose draft layers would need "
            f"leases of their own (allowed: {allowed})"
        ]
    if vllm_config.scheduler_config.async_scheduling:
        return [
            "--speculative-config under asynchronous scheduling, which counts drafts before they "
            "are accepted (add --no-async-scheduling)"
        ]
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return ["--speculative-config beside --pipeline-parallel-size, which is not tested"]
    return []


def _sends_events(vllm_config: VllmConfig) -> bool:
    events = vllm_config.kv_events_config
    return events is not None and events.enable_kv_cache_events


def _shares(config: MixedDimConfig, model: ModelConfig) -> bool:
    """Whether a server's requests read compressed prefixes, see :attr:`.Policy.shares`."""
    if _has_windows(model):
        return False
    return config.shares_prefixes(config.heads_path(model.model) is not None)


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


def refuse_settings_without_backend(additional_config: object) -> None:
    """Raise where our settings are given, but not our backend.

    Raises:
        ConfigError: naming the flag that is missing.
    """
    if isinstance(additional_config, dict) and "mixeddim" in additional_config:
        raise ConfigError(
            "--additional-config has a mixeddim block, but the attention backend is not "
            "mixeddim; add --attention-backend mixeddim"
        )


def refuse_layer(**features: object) -> None:
    """Raise where a layer of the model uses a feature of attention that leases do not have.

    Args:
        **features: what a layer asks for, by the names of vLLM's arguments; None or 0 for not.

    Raises:
        ConfigError: naming the feature.
    """
    for name, value in features.items():
        if value:
            raise ConfigError(
                f"--attention-backend mixeddim: this model uses {_FEATURES[name]}; it is not "
                "supported"
            )


_FEATURES = {
    "alibi_slopes": "ALiBi",
    "sliding_window": "sliding-window attention",
    "logits_soft_cap": "logits soft cap",
    "kv_sharing_target_layer_name": "KV sharing between layers",
}


def refuse_spec(spec: KVCacheSpec) -> None:
    """Raise where a layer's cache is not that of plain full attention.

    Raises:
        ConfigError: naming what it needs.
    """
    if type(spec) is not FullAttentionSpec:
        raise ConfigError(
            f"--attention-backend mixeddim: a layer needs {type(spec).__name__}; only full "
            "attention is supported"
        )


def refuse_layers(specs: Iterable[KVCacheSpec], one_group: bool | None, stages: int = 1) -> None:
    """Raise where a model's layers do not go together.

    Args:
        specs: of the layers.
        one_group: whether vLLM was told to keep all layers in one group.
        stages: of the pipeline.

    Raises:
        ConfigError: saying why.
    """
    kinds = list(specs)
    ours = [spec for spec in kinds if not isinstance(spec, SlidingWindowSpec)]
    if len(ours) < len(kinds) and stages > 1:
        raise ConfigError(
            "--attention-backend mixeddim does not support --pipeline-parallel-size with models "
            "that have sliding-window layers"
        )
    if not ours:
        raise ConfigError(
            "--attention-backend mixeddim: every layer of this model has a sliding window, so "
            "there is nothing to compress; leave the flag out, or give --disable-sliding-window, "
            "with which the context is as long as the window at most"
        )
    if any(spec != ours[0] for spec in ours):
        raise ConfigError(
            "--attention-backend mixeddim needs the same KV heads and head size in every "
            "full-attention layer; this model's differ"
        )
    if len(ours) < len(kinds) and one_group:
        raise ConfigError(
            "--attention-backend mixeddim needs vLLM's hybrid KV cache manager for models with "
            "sliding-window layers, and it is off here (--disable-hybrid-kv-cache-manager)"
        )


def refuse_groups(groups: Sequence[Sequence[KVCacheSpec]]) -> None:
    """Raise where vLLM has divided a model's layers so that leases do not fit.

    Args:
        groups: the specs of each group's layers.

    Raises:
        ConfigError: saying how.
    """
    ours = [group for group in groups if not isinstance(group[0], SlidingWindowSpec)]
    if len(ours) > 1:
        raise ConfigError(
            "--attention-backend mixeddim needs all full-attention layers in one group; vLLM has "
            f"divided this model's among {len(ours)}, as it does where fewer layers have sliding "
            "windows"
        )
    held = sum(spec.real_page_size_bytes for spec in ours[0])
    widest = max(sum(spec.page_size_bytes for spec in group) for group in groups)
    if held < widest:
        raise ConfigError(
            "--attention-backend mixeddim needs full-attention layers to fill a block; of this "
            f"model's {widest} bytes, which as many layers with sliding windows take, they would "
            f"hold {held}"
        )


def refuse_block_size(tokens: int, device_type: str) -> None:
    """Raise where vLLM has enlarged our blocks beyond what kernels take.

    Args:
        tokens: of a block.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: naming the size.
    """
    if device_type == "cuda" and tokens > MAX_GPU_BLOCK_SIZE:
        raise ConfigError(
            f"--attention-backend mixeddim: vLLM has made blocks of {tokens} tokens, so that "
            "full-attention layers take as many bytes of one as those with sliding windows; GPU "
            f"kernels hold whole pages in shared memory (allowed: up to {MAX_GPU_BLOCK_SIZE})"
        )


@dataclass(frozen=True)
class Room:
    """What a request may take.

    Attributes:
        on_gpu: whether memory was set aside for compressing to the server's budget at most.
        tokens: that the cache holds at full size; None where that is not known.
        longest: tokens of a request at most.
        shares: whether what the prefix cache finds may be compressed to the server's budget.
    """

    on_gpu: bool = False
    tokens: int | None = None
    longest: int = 0
    shares: bool = False

    @classmethod
    def of(cls, vllm_config: VllmConfig, config: MixedDimConfig, on_gpu: bool) -> Room:
        """That of a server, after its engine has sized the cache."""
        cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
        tokens = None
        if cache.num_gpu_blocks:
            # One block is vLLM's null block, which is never lent.
            blocks = cache.num_gpu_blocks // _engines(parallel) - 1
            tokens = (blocks - _most_in_windows(vllm_config, config)) * cache.block_size
        model = vllm_config.model_config
        return cls(on_gpu, tokens, model.max_model_len, _shares(config, model))


def _engines(parallel: ParallelConfig) -> int:
    """Engines of whose caches an API process knows the sum."""
    if parallel.data_parallel_rank_local is not None:
        return 1
    if parallel.local_engines_only:
        return parallel.data_parallel_size_local
    return parallel.data_parallel_size


def _has_windows(model: ModelConfig) -> bool:
    """Whether some of a model's layers have sliding windows."""
    return "sliding_attention" in (getattr(model.hf_text_config, "layer_types", None) or ())


def _most_in_windows(vllm_config: VllmConfig, config: MixedDimConfig) -> int:
    """Blocks that layers with sliding windows may hold of one request, or some more.

    They are what vLLM counts for the longest request, less what compression keeps of it at least.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if not _has_windows(model) or not cache.kv_cache_max_concurrency:
        return 0
    assert cache.num_gpu_blocks is not None
    engines = _engines(vllm_config.parallel_config)
    counted = cache.num_gpu_blocks // engines / cache.kv_cache_max_concurrency
    share = 1.0 if not config.enabled or config.budget is None else config.budget
    kept = share * model.max_model_len // cache.block_size
    return max(0, math.ceil(counted - kept))


def admit(
    params: object, config: MixedDimConfig, room: Room = Room(), prompt_tokens: int = 0
) -> None:
    """Check a request's ``mixeddim_*`` fields.

    Args:
        params: the request's parameters.
        config: the server's settings.
        room: what the server has.
        prompt_tokens: length of the request's prompt.

    Raises:
        VLLMValidationError: a field is unknown or out of range; vLLM answers HTTP 400 with
            its text. (Any other exception that comes from here would be a 500.)
    """
    if not isinstance(params, SamplingParams):
        if room.shares and isinstance(params, PoolingParams):
            params.skip_reading_prefix_cache = True  # its worker would not be told of leases
        return
    try:
        budget = request_budget(params.extra_args)
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    if budget is not None and not config.enabled and budget.share != 1.0:
        raise VLLMValidationError(
            "compression is off on this server (mixeddim.enabled is false); allowed is "
            f"{REQUEST_BUDGET} 1.0, or none",
            parameter="vllm_xargs",
        )
    larger = budget is not None and _may_exceed(budget, config.default_budget, whole=True)
    most = min(room.longest, prompt_tokens + (params.max_tokens or room.longest))
    if larger and room.tokens is not None and most > room.tokens:
        raise VLLMValidationError(
            f"this request's budget may keep up to {most} tokens (prompt and max_tokens) at full "
            f"size; this server's KV cache holds {room.tokens}, which is enough for its own budget "
            "alone; allowed are that budget, a smaller one, or fewer tokens",
            parameter="vllm_xargs",
        )
    if budget is not None and room.on_gpu and _takes_more_memory(budget, config.default_budget):
        raise VLLMValidationError(
            "this request's budget may keep more than the server's, for which alone memory was set "
            "aside on the GPU; allowed are budgets up to the server's in the same unit, or "
            f"{REQUEST_BUDGET} 1.0 for no compression",
            parameter="vllm_xargs",
        )
    larger_lease = budget is not None and _may_exceed(budget, config.default_budget, whole=False)
    if larger_lease or (budget is not None and room.shares):
        # The cap on prefix-cache hits assumes the default lease. A larger one reaches further
        # forward and could otherwise cover blocks that other requests share. And what others
        # have compressed has their budget, not this one.
        params.skip_reading_prefix_cache = True


def _may_exceed(budget: Budget, default: Budget, whole: bool) -> bool:
    """Whether a budget may lease blocks before the default's lease for some prompt.

    So does any budget where the default leases nothing: a share of 1, or more tokens than the
    prompt has.

    Args:
        budget: a request's own.
        default: the server's.
        whole: whether a budget that keeps everything, and leases nothing, counts.
    """
    if budget.share == 1.0:
        return whole
    if budget.share is None or default.share is None or default.share == 1.0:
        return True
    return budget.share > default.share


def _takes_more_memory(budget: Budget, default: Budget) -> bool:
    """Whether compressing to a budget may take more memory than to the default.

    A lease is made whole before it is written. Where the default keeps all there is none.
    """
    if budget.share == 1.0:
        return False
    if default.share == 1.0:
        return True
    if budget.tokens is not None and default.tokens is not None:
        return budget.tokens > default.tokens
    if budget.share is not None and default.share is not None:
        return budget.share > default.share
    return True
