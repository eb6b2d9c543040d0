"""Layers with sliding windows beside leases: their blocks, their attention, what is refused."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from mdkv_vllm.config import ConfigError, MixedDimConfig
from mdkv_vllm.plugin.cpu_platform import MixedDimCpuPlatform
from mdkv_vllm.plugin.registration import BACKEND_CLASS
from mdkv_vllm.plugin.spec import MixedDimSpec
from mdkv_vllm.plugin.validation import Room, refuse_groups, refuse_layers
from mdkv_vllm.plugin.windowed import WindowedCpuBackend, WindowedCpuImpl

SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


def windowed(window=64):
    return SlidingWindowSpec(sliding_window=window, **SIZES)


def full(**changes):
    return MixedDimSpec.of(
        FullAttentionSpec(**SIZES | changes), MixedDimConfig(), 2,
        head_scores=True, other_layers=True, in_flight_tokens=100,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("specs", "one_group", "message"),
    [
        ([windowed(), windowed()], False, "every layer of this model has a sliding window"),
        ([full(), full(head_size=128), windowed()], False, "same KV heads and head size"),
        ([full(), windowed()], True, "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_layers_that_do_not_go_together(specs, one_group, message):
    with pytest.raises(ConfigError, match=message):
        refuse_layers(specs, one_group)


def test_layers_that_do():
    refuse_layers([full(), full()], one_group=True)
    refuse_layers([full(), windowed(), windowed(32)], one_group=False)


def test_full_attention_in_several_groups_is_refused():
    refuse_groups([[full()], [windowed()], [windowed()]])
    with pytest.raises(ConfigError, match="one group; vLLM has divided this model's among 2"):
        refuse_groups([[full()], [windowed()], [full()]])


def test_compressed_prefixes_are_not_shared_beside_other_layers():
    settings = {"budget": 0.3, "segments": "rolling"}
    alone = MixedDimSpec.of(
        FullAttentionSpec(**SIZES), MixedDimConfig(**settings), 2,
        head_scores=True, in_flight_tokens=100,
    )  # fmt: skip
    beside = MixedDimSpec.of(
        FullAttentionSpec(**SIZES), MixedDimConfig(**settings), 2,
        head_scores=True, other_layers=True, in_flight_tokens=100,
    )  # fmt: skip
    assert alone.policy.shares
    assert not beside.policy.shares


def layer(**changes):
    asked = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16}
    return AttentionSelectorConfig(**asked | changes)


def test_each_layer_gets_its_backend():
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    ours = AttentionBackendEnum["MIXEDDIM"]
    choose = MixedDimCpuPlatform.get_attn_backend_cls
    assert choose(ours, layer()) == BACKEND_CLASS
    chosen = choose(ours, layer(has_sliding_window=True))
    assert resolve_obj_by_qualname(chosen) is WindowedCpuBackend
    with pytest.raises(ConfigError, match="attention sinks"):
        choose(ours, layer(has_sink=True))
    with pytest.raises(ConfigError, match=r"sliding windows by CPU_ATTN: kv_cache_dtype"):
        choose(ours, layer(has_sliding_window=True, kv_cache_dtype="bfloat16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_lease_left_in_a_block_is_not_seen(dtype):
    """Bytes of a lease may be no numbers; vLLM's kernel multiplies whole blocks."""
    torch.manual_seed(0)
    layers, heads, size, block, window, total = 3, 2, 64, 16, 40, 150
    whole = torch.full((20, layers * heads, block, 2 * size), torch.nan, dtype=dtype)
    view = whole[:, heads : 2 * heads]  # the second of a block's layers
    table = torch.randperm(20)[: -(-total // block)].int()
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, ops

    from mdkv_vllm.plugin.compat import attention_isa

    with set_current_vllm_config(VllmConfig()):
        del config
