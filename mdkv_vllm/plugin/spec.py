"""The KV cache spec: full attention whose blocks are managed by leases."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.plugin.manager import MixedDimManager
from mdkv_vllm.plugin.windowed import WindowedManager, WindowedSpec
from mdkv_vllm.policy import Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class MixedDimSpec(FullAttentionSpec):
    """Full attention plus what the scheduler needs to plan leases.

    Attributes:
        config: the settings.
        num_layers: full-attention layers of the model, those of all pipeline stages together.
        head_scores: whether heads have budgets by their scores.
        other_layers: whether layers with sliding windows have blocks of their own.
        in_flight_tokens: that vLLM may have scheduled beyond those known to be computed.
    """

    config: MixedDimConfig
    num_layers: int
    head_scores: bool
    other_layers: bool
    in_flight_tokens: int

    @property
    def policy(self) -> Policy:
        """The settings applied to this model."""
        geometry = PageGeometry(self.block_size, self.head_size, self.dtype)
        return Policy(
            self.config,
            geometry,
            self.num_layers,
            self.num_kv_heads,
            self.head_scores,
            self.other_layers,
        )

    @classmethod
    def of(
        cls,
        spec: FullAttentionSpec,
        config: MixedDimConfig,
        num_layers: int,
        *,
        head_scores: bool,
        in_flight_tokens: int,
        other_layers: bool = False,
    ) -> Self:
        """Extend vLLM's own spec of a layer."""
        inherited = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec)}
        return cls(
            **inherited,
            config=config,
            num_layers=num_layers,
            head_scores=head_scores,
            other_layers=other_layers,
            in_flight_tokens=in_flight_tokens,
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What vLLM wants to have room for: one request of the longest length, at its largest."""
        longest = vllm_config.model_config.max_model_len
        most = self.policy.most_blocks(longest, self.in_flight_tokens)
        return most * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group of layers, which must all be alike.

        Raises:
            AssertionError: they are not, as vLLM expects it to tell groups apart.
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers that differ have no spec in common")
        return specs[0]


def register_specs() -> None:
    """Tell vLLM which managers serve our specs; idempotent."""
    KVCacheSpecRegistry.register(
        MixedDimSpec, MixedDimManager, uniform_type_base_spec=FullAttentionSpec
    )
    KVCacheSpecRegistry.register(
        WindowedSpec, WindowedManager, uniform_type_base_spec=SlidingWindowSpec
    )
