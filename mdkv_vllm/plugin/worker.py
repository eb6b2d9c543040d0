"""vLLM's CPU worker with a runtime that compresses between two steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from mdkv_vllm.calibrate.artifact import load_basis, load_head_budgets
from mdkv_vllm.config import EVEN_HEADS, ConfigError
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.plugin.backend import MixedDimBackend
from mdkv_vllm.plugin.rows import RunnerV1Rows
from mdkv_vllm.plugin.runtime import Runtime, install_runtime
from mdkv_vllm.plugin.spec import MixedDimSpec
from mdkv_vllm.policy import Policy

# vLLM shows only what loggers below its own name say.
logger = init_logger(f"vllm.{__name__}")


class MixedDimCPUWorker(CPUWorker):
    """A CPU worker whose compressed prompts live in leases."""

    _runtime: Runtime | None = None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Specs of the model's layers, as vLLM asks for them before it sizes the cache."""
        MixedDimBackend.serve(self.vllm_config)
        return super().get_kv_cache_spec()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache as vLLM does, then set up the runtime over it."""
        super().initialize_from_config(kv_cache_config)
        layers = attention_layers(self.vllm_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        spec = specs[0]
        if len(specs) != 1 or not isinstance(spec, MixedDimSpec):
            raise ConfigError(
                "--attention-backend mixeddim needs one group of full-attention layers; this "
                f"model has {[type(s).__name__ for s in specs]}"
            )
        scales = {layer.impl.scale for layer in layers}
        if len(scales) != 1:
            raise ConfigError("--attention-backend mixeddim: layers differ in their score scale")
        policy = spec.policy
        model = self.vllm_config.model_config
        sizes = (policy.num_layers, model.get_total_num_kv_heads())
        heads = load_head_budgets(policy.config, model.model, sizes)
        if heads is not None:
            heads = heads.of_heads(self._own_heads(policy))
        self._runtime = Runtime(
            policy,
            self._load_basis(policy),
            heads,
            arena_of([layer.kv_cache for layer in layers], policy),
            layers[0].num_heads,
            scales.pop(),
            RunnerV1Rows(self.model_runner),
        )
        install_runtime(self._runtime)
        logger.info("mixeddim: %s", describe(policy, heads))

    def _load_basis(self, policy: Policy) -> Basis | None:
        formats = policy.formats
        if not formats.uses_basis or policy.prompt_basis:
            return None
        path = policy.config.basis_path(self.vllm_config.model_config.model)
        if not path.is_file():
            raise ConfigError(
                f"mixeddim.basis: {path} does not exist, and formats {', '.join(formats.names)} "
                "need a basis; make it with 'mdkv calibrate', or set basis to 'prompt'"
            )
        model = self.vllm_config.model_config
        sizes = (policy.num_layers, model.get_total_num_kv_heads(), policy.geometry.head_size)
        basis = load_basis(path, model.model, sizes).of_heads(self._own_heads(policy))
        return basis.truncate(formats.basis_rank)

    def _own_heads(self, policy: Policy) -> slice:
        ranks = self.parallel_config.tensor_parallel_size
        total = self.vllm_config.model_config.get_total_num_kv_heads()
        return heads_of_rank(self.rank % ranks, ranks, total, policy.num_kv_heads)

    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """Compress the prompts that ended in the last step, then run this one."""
        if self._runtime is not None:
            self._runtime.compress_ended(
                scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or set()
            )
        return super().execute_model(scheduler_output)

    def mixeddim_status(self) -> dict[str, Any]:
        """Totals and recent compressions, for ``collective_rpc``."""
        assert self._runtime is not None
        return asdict(self._runtime.totals)


def attention_layers(vllm_config: VllmConfig) -> list[Attention]:
    """The model's attention layers, in the order of their place in the cache."""
    context = vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if isinstance(layer, Attention)]
    return sorted(layers, key=lambda layer: layer.kv_cache.data_ptr())


def heads_of_rank(rank: int, ranks: int, total: int, count: int) -> slice:
    """KV heads of the model that a tensor-parallel rank holds.

    Args:
        rank: its number, from 0.
        ranks: how many there are; more than ``total`` hold copies.
        total: KV heads of the model.
        count: KV heads of each rank.
    """
    first = rank * total // ranks
    return slice(first, first + count)


def arena_of(views: list[torch.Tensor], policy: Policy) -> torch.Tensor:
    """The whole cache as one tensor over its layers' views.

    Args:
        views: per layer ``[blocks, kv_heads, block_size, 2 * head_size]``, in memory order.
        policy: the settings applied to the model.

    Returns:
        ``[blocks, layers * kv_heads, block_size, 2 * head_size]``, contiguous.

    Raises:
        ConfigError: the views do not lie block by block, all layers side by side.
    """
    pages, size = policy.layout.pages_per_block, policy.geometry
    content = 2 * size.head_size
    stride = (pages * size.block_size * content, size.block_size * content, content, 1)
    first = views[0]
    expected = [
        first.storage_offset() + i * policy.num_kv_heads * stride[1] for i in range(len(views))
    ]
    if (
        len(views) != policy.num_layers
        or first.stride(0) != stride[0]
        or [view.storage_offset() for view in views] != expected
    ):
        raise ConfigError(
            "--attention-backend mixeddim needs the KV cache layout BLHNC (all layers of a block "
            "side by side); unset VLLM_KV_CACHE_LAYOUT"
        )
    shape = (first.shape[0], pages, size.block_size, content)
    return first.as_strided(shape, stride, first.storage_offset())


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
        f"{config.min_prompt_tokens} tokens, pages of {policy.geometry.page_bytes} bytes"
    )
