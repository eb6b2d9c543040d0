"""The attention backend as vLLM sees it: capabilities, metadata, and one layer's forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES
from mdkv_vllm.plugin.kv_cache import attention_layers, every_layer, store_tokens
from mdkv_vllm.plugin.registration import BACKEND_NAME, DEFAULT_BLOCK_SIZE
from mdkv_vllm.plugin.validation import refuse_layer, refuse_spec
from mdkv_vllm.plugin.worker_runtime.metadata import MixedDimMetadata
from mdkv_vllm.plugin.worker_runtime.runtime import current_runtime

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheDType
    from vllm.platforms.interface import DeviceCapability

MIN_CAPABILITY = 75
"""The oldest GPUs that the kernels are compiled for (T4)."""


class MixedDimBackend(AttentionBackend):
    """Full attention over a cache whose prompts may be compressed."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False
    _served: ClassVar[VllmConfig | None] = None

    @staticmethod
    def get_name() -> str:
        """Name of the enum member."""
        return BACKEND_NAME

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:  # noqa: ANN401
        """Any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """What blocks have where the user does not choose, whatever the platform's default."""
        del default_block_size
        return DEFAULT_BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Those that vLLM's CPU backend takes, or that GPU kernels are built for."""
        from vllm.platforms import current_platform

        if current_platform.is_cuda():
            return list(GPU_HEAD_SIZES)
        return [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Leases cannot be moved yet."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability | None) -> bool:
        """GPUs that the kernels are compiled for; a CPU has no capability."""
        return capability is None or capability.to_int() >= MIN_CAPABILITY

    @classmethod
    def supports_sink(cls) -> bool:
        """Prefill has them on CPUs."""
        from vllm.platforms import current_platform

        return current_platform.is_cpu()

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layers of a block side by side, so that a lease may use any page of a block."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Hand the block manager what it needs to plan leases.

        Raises:
            ConfigError: the layer is not plain full attention.
        """
        from mdkv_vllm.plugin.spec import MixedDimSpec

        if isinstance(spec, MixedDimSpec):
            return spec
        refuse_spec(spec)
        assert cls._served is not None, "the worker names its configuration first"
        config = MixedDimConfig.from_additional_config(cls._served.additional_config)
        model, ours = cls._served.model_config, attention_layers(cls._served)
        stages = cls._served.parallel_config.pipeline_parallel_size
        return MixedDimSpec.of(
            spec,
            config,
            # A stage sees its own layers alone; where there are stages, none has a window.
            model.get_total_num_hidden_layers() if stages > 1 else len(ours),
            head_scores=config.heads_path(model.model) is not None,
            other_layers=len(ours) < len(every_layer(cls._served)),
            in_flight_tokens=cls._served.max_in_flight_tokens,
        )

    @classmethod
    def serve(cls, vllm_config: VllmConfig) -> None:
        """Name the configuration for :meth:`customize_spec`, which vLLM calls without one."""
        cls._served = vllm_config

    @staticmethod
    def get_impl_cls() -> type[MixedDimImpl]:
        """The layer's implementation."""
        return MixedDimImpl

    @staticmethod
    def get_builder_cls() -> type[MixedDimMetadataBuilder]:
        """The metadata builder."""
        return MixedDimMetadataBuilder


class MixedDimMetadataBuilder(AttentionMetadataBuilder[MixedDimMetadata]):
    """Turns vLLM's batch into prefills, decodes and prompts to compress.

    Steps of requests that generate, of as many tokens each, can be replayed from CUDA graphs: their
    grids follow from shapes alone and their numbers lie in buffers that stay.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> MixedDimMetadata:
        """Build one step's metadata, shared by all layers."""
        return current_runtime().begin_step(common_attn_metadata)


class MixedDimImpl(AttentionImpl[MixedDimMetadata]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refuse_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sinks = sinks

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys and values, ``[tokens, kv_heads, head_size]``, at full dimension."""
        store_tokens(layer, key, value, kv_cache, slot_mapping, self.kv_cache_dtype)

    def forward(
        self,
        layer: Any,  # noqa: ANN401
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: MixedDimMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; ``attn_metadata`` is None only while vLLM warms up.

        Args:
            layer: vLLM's layer; not used.
            query: ``[tokens, query_heads, head_size]``.
            key: ``[tokens, kv_heads, head_size]``.
            value: ``[tokens, kv_heads, head_size]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` view of this layer.
            attn_metadata: this step's metadata.
            output: ``[tokens, query_heads, head_size]``, written in place.
            output_scale: fused output quantization; refused.
            output_block_scale: likewise.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("mixeddim: fused output quantization is not supported")
        if attn_metadata is None:
            return output.fill_(0)
        current_runtime().attend(kv_cache, query, key, value, attn_metadata, self.scale, output)
        return output
