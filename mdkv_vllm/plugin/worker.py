"""vLLM's workers with a runtime that compresses between two steps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from mdkv_vllm.config import COMPRESSED, EVEN_HEADS, ConfigError
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.plan import AUTO_PROMPT_TOKENS, Rule
from mdkv_vllm.kernels.interface import DecodeConfig, ReadConfig
from mdkv_vllm.kernels.registry import compression_kernels, decode_kernel
from mdkv_vllm.kernels.sinks import SinkDecode
from mdkv_vllm.plugin.artifacts import RankArtifacts, total_kv_heads
from mdkv_vllm.plugin.backend import MixedDimBackend
from mdkv_vllm.plugin.kv_cache import attention_layers, kv_cache_of, layer_specs, sinks_of
from mdkv_vllm.plugin.metrics.configuration import configuration
from mdkv_vllm.plugin.metrics.directory import start_recording
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.prefill.choose import choose_prefill
from mdkv_vllm.plugin.rows import batch_order, computed_tokens, new_requests
from mdkv_vllm.plugin.spec import MixedDimSpec
from mdkv_vllm.plugin.validation import refuse_block_size, refuse_groups, refuse_layers
from mdkv_vllm.plugin.windowed import WindowedSpec
from mdkv_vllm.plugin.worker_runtime.metadata import StepLimits
from mdkv_vllm.plugin.worker_runtime.runtime import Runtime, install_runtime
from mdkv_vllm.policy import Policy

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object

# vLLM shows only what loggers below its own name say.
logger = init_logger(f"vllm.{__name__}")


class MixedDimWorker(Worker):
    """What turns any of vLLM's workers into one whose compressed prompts live in leases."""

    _runtime: Runtime | None = None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Specs of the model's layers, as vLLM asks for them before it sizes the cache."""
        MixedDimBackend.serve(self.vllm_config)
        specs = super().get_kv_cache_spec()
        one_group = self.scheduler_config.disable_hybrid_kv_cache_manager
        stages = self.parallel_config.pipeline_parallel_size
        refuse_layers(specs.values(), one_group, stages)
        return {
            name: WindowedSpec.of(spec) if isinstance(spec, SlidingWindowSpec) else spec
            for name, spec in specs.items()
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache as vLLM does, then set up the runtime over it."""
        super().initialize_from_config(kv_cache_config)
        groups = [layer_specs(group) for group in kv_cache_config.kv_cache_groups]
        refuse_groups(groups)
        layers = attention_layers(self.vllm_config)
        policy = policy_of(chain(*groups), len(layers))
        refuse_block_size(policy.geometry.block_size, self.device.type)
        kv_cache = kv_cache_of([layer.kv_cache for layer in layers], policy)
        self._runtime = self._make_runtime(policy, kv_cache)
        install_runtime(self._runtime)

    def _make_runtime(self, policy: Policy, kv_cache: torch.Tensor) -> Runtime:
        """Everything that stands around a cache.

        Raises:
            ConfigError: the model or the settings do not go with the device.
        """
        config, model = policy.config, self.vllm_config.model_config
        layers = attention_layers(self.vllm_config)
        scales = {layer.impl.scale for layer in layers}
        if len(scales) != 1:
            raise ConfigError("--attention-backend mixeddim: layers differ in their score scale")
        scale = scales.pop()
        artifacts = RankArtifacts.load(policy, self.vllm_config, self.rank)
        limits = step_limits(self.vllm_config, policy)
        sinks = sinks_of(layers)
        reads = ReadConfig(kv_cache, policy.layout, artifacts.basis)
        prefill_name, prefill = choose_prefill(config.prefill, reads, model.dtype, sinks)
        group = layers[0].num_heads // policy.num_kv_heads
        decode_config = DecodeConfig(
            kv_cache, policy.layout, group, artifacts.basis, scale, limits.requests, limits.leases
        )
        decode_name, decode = decode_kernel(config.kernels, decode_config)
        if sinks is not None:
            decode = SinkDecode(decode, sinks)
        compressor = Compressor(
            policy.layout,
            LOSSES[config.loss],
            scale,
            artifacts.basis,
            artifacts.heads,
            compression_kernels(config.kernels, kv_cache.device),
        )
        logger.info_once("mixeddim: %s", describe(policy, artifacts.heads))
        logger.info_once("mixeddim: decode by %s, prefill by %s", decode_name, prefill_name)
        self._kernels = {"decode": decode_name, "prefill": prefill_name}
        return Runtime(
            policy,
            compressor,
            decode,
            prefill,
            kv_cache,
            layers[0].num_heads,
            model.dtype,
            limits,
            batch_order(self.model_runner, self.use_v2_model_runner),
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """As vLLM does it; the requests that it makes up meanwhile are not counted."""
        times = super().compile_or_warm_up_model()
        assert self._runtime is not None
        start_recording(self.vllm_config, self.rank)
        policy, model = self._runtime.policy, self.vllm_config.model_config
        self._configuration = configuration(policy, model.model)
        heads = total_kv_heads(policy, self.vllm_config)
        self._runtime.start_counting(WorkerMetrics(policy, self._configuration, heads))
        return times

    # As vLLM's own: what a step makes, the next one may write to.
    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """Compress segments that are due, then run this step."""
        assert self._runtime is not None
        with self._runtime.step(
            scheduler_output.finished_req_ids,
            scheduler_output.preempted_req_ids or set(),
            new_requests(scheduler_output),
            computed_tokens(scheduler_output),
        ):
            return super().execute_model(scheduler_output)

    def mixeddim_status(self) -> dict[str, Any]:
        """Configuration, kernels, totals and requests, for ``collective_rpc``."""
        assert self._runtime is not None
        return {
            "configuration": self._configuration,
            "kernels": self._kernels,
            **self._runtime.status(),
        }


def policy_of(specs: Iterable[KVCacheSpec], num_layers: int) -> Policy:
    """The settings applied to a worker's full-attention layers, whose specs carry them.

    Args:
        specs: of the worker's layers.
        num_layers: full-attention layers of the worker.
    """
    policy = next(spec.policy for spec in specs if isinstance(spec, MixedDimSpec))
    return policy.of_stage(num_layers)


def step_limits(vllm_config: VllmConfig, policy: Policy) -> StepLimits:
    """How large a step may be under a configuration."""
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    mode = compilation.cudagraph_mode or CUDAGraphMode.NONE
    graph_tokens = 0
    if mode.decode_mode() == CUDAGraphMode.FULL:
        graph_tokens = compilation.max_cudagraph_capture_size or 0
    return StepLimits(
        scheduler.max_num_batched_tokens,
        max(scheduler.max_num_seqs, graph_tokens),
        policy.most_leases(vllm_config.model_config.max_model_len),
        graph_tokens,
        vllm_config.uniform_decode_query_len,
    )


def describe(policy: Policy, heads: HeadBudgets | None) -> str:
    """One line on the configuration in force.

    Args:
        policy: the settings applied to the model.
        heads: how heads share a lease's pages; None for evenly by layer.
    """
    config = policy.config
    if not config.enabled:
        return "compression is off (enabled: false)"
    budget = (
        f"budget {config.budget:.0%}" if config.budget else f"budget {config.budget_tokens} tokens"
    )
    if heads is not None:
        by_head = f"{heads.share:.0%} of it by head scores to the power {heads.power:g}"
    elif config.heads == EVEN_HEADS:
        by_head = "the same for every layer (heads: even)"
    else:
        by_head = "the same for every layer (no head scores; 'mdkv head-scores' makes them)"
    return (
        f"{budget}, {by_head}, formats {', '.join(policy.formats.names)}, "
        f"loss {config.loss}, window {config.window}, prompts from "
        f"{config.min_prompt_tokens} tokens, {_segments(policy)}, {_prefixes(policy)}, pages of "
        f"{policy.geometry.page_bytes} bytes"
    )


def _segments(policy: Policy) -> str:
    """Which tokens are compressed together, in words."""
    config = policy.config
    if not policy.answers:
        why = (
            "basis: prompt"
            if policy.prompt_basis
            else "no head scores; make them with mdkv head-scores"
        )
        return f"each prompt as one segment, answers uncompressed ({why})"
    prompts = {
        Rule.PROMPT: "each prompt as one segment,",
        Rule.ROLLING: "prompts",
        Rule.AUTO: f"prompts beyond {AUTO_PROMPT_TOKENS}",
    }[Rule(config.segments)]
    return f"{prompts} and answers in segments of {config.segment_tokens}"


def _prefixes(policy: Policy) -> str:
    """What requests read of each other, in words."""
    if policy.other_layers:
        return "prefixes shared at full size (layers with sliding windows have no leases)"
    return f"prefixes shared {COMPRESSED if policy.shares else 'at full size'}"
