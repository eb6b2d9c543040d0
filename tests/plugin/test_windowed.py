"""Layers with sliding windows beside leases: their blocks, their attention, what is refused."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, ops
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from mdkv_vllm.config import ConfigError, MixedDimConfig
from mdkv_vllm.plugin.backend import MixedDimImpl
from mdkv_vllm.plugin.compat import attention_isa
from mdkv_vllm.plugin.cpu_platform import MixedDimCpuPlatform
from mdkv_vllm.plugin.cpu_windowed import WindowedCpuBackend, WindowedCpuImpl
from mdkv_vllm.plugin.registration import BACKEND_CLASS
from mdkv_vllm.plugin.spec import MixedDimSpec
from mdkv_vllm.plugin.validation import Room, refuse_block_size, refuse_groups, refuse_layers

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


def test_stages_of_layers_with_windows():
    refuse_layers([full(), full()], False, stages=2)
    with pytest.raises(ConfigError, match="--pipeline-parallel-size"):
        refuse_layers([windowed()], False, stages=2)


def test_layers_that_do():
    refuse_layers([full(), full()], one_group=True)
    refuse_layers([full(), windowed(), windowed(32)], one_group=False)


def test_full_attention_that_does_not_fill_a_block_is_refused():
    refuse_groups([[full()] * 3, [windowed()] * 2])
    with pytest.raises(ConfigError, match="fill a block"):
        refuse_groups([[windowed()] * 3, [full()] * 2])


def test_blocks_larger_than_gpu_kernels_take_are_refused():
    refuse_block_size(48, "cuda")
    refuse_block_size(64, "cpu")
    with pytest.raises(ConfigError, match="blocks of 64 tokens"):
        refuse_block_size(64, "cuda")


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
    with pytest.raises(ConfigError, match=r"sliding windows by CPU_ATTN: head_size"):
        choose(ours, layer(has_sliding_window=True, head_size=60))


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    from transformers import Gemma3TextConfig
    from vllm.engine.arg_utils import EngineArgs

    folder = tmp_path_factory.mktemp("model")
    Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=192, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_hidden_layers=6,
        architectures=["Gemma3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    arguments = EngineArgs(model=str(folder), attention_backend="mixeddim", enforce_eager=True)
    return arguments.create_engine_config()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_lease_left_in_a_block_is_not_seen(vllm_config, dtype):
    """Its bytes may be no numbers, and vLLM's kernel multiplies whole blocks before it masks.

    The layer is the second of three in every block; its tokens come in two steps.
    """
    torch.manual_seed(0)
    heads, group, size, window, total = 2, 2, 64, 40, 150
    whole = torch.full((20, 3 * heads, 16, 2 * size), torch.nan, dtype=dtype)
    kv_cache = whole[:, heads : 2 * heads]
    table = torch.randperm(20)[:10].int().unsqueeze(0)
    query = torch.randn(total, heads * group, size).to(dtype)
    key, value = torch.randn(2, total, heads, size).to(dtype)
    layer = SimpleNamespace(
        isa=attention_isa(dtype, 16, size), _k_scale_float=1.0, _v_scale_float=1.0
    )
    with set_current_vllm_config(vllm_config):
        impl = WindowedCpuImpl(heads * group, size, 0.3, heads, None, window, "auto")
    output = torch.empty_like(query)
    for begin, end in ((0, 101), (101, total)):
        rows = slice(begin, end)
        slots = torch.tensor([int(table[0, i // 16]) * 16 + i % 16 for i in range(begin, end)])
        impl.do_kv_cache_update(layer, key[rows], value[rows], kv_cache, slots)
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        lengths = torch.tensor([end], dtype=torch.int32)
        plan = ops.cpu_attn_get_scheduler_metadata(
            1, heads * group, heads, size, lengths, dtype, starts, True, window, layer.isa, True
        )
        metadata = CPUAttentionMetadata(
            end - begin, end - begin, starts, end, lengths, table, slots, plan
        )
        impl.forward(layer, query[rows], key[rows], value[rows], kv_cache, metadata, output[rows])
    far = torch.arange(total)[:, None] - torch.arange(total)
    grouped = query.double().unflatten(1, (heads, group))
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key.double())
    weights = (0.3 * scores).masked_fill((far < 0) | (far >= window), -torch.inf).softmax(-1)
    exact = torch.einsum("hgqk,khd->qhgd", weights, value.double()).flatten(1, 2)
    assert (output - exact).abs().max() < (1e-5 if dtype is torch.float32 else 0.03)
    assert whole[:, :heads].isnan().all()
    assert whole[:, 2 * heads :].isnan().all()


def test_soft_cap_and_shared_caches_are_refused_by_name():
    for feature, named in (
        ({"logits_soft_cap": 50.0}, "soft cap"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV sharing"),
    ):
        with pytest.raises(ConfigError, match=named):
            MixedDimImpl(4, 64, 1.0, **feature)


@pytest.mark.parametrize(
    ("concurrency", "settings", "tokens"),
    [
        (None, {"budget": 0.5}, 999 * 16),
        (5.0, {"budget": 0.5}, 911 * 16),
        (5.0, {"enabled": False}, 999 * 16),
    ],
)
def test_room_beside_what_windows_hold(vllm_config, concurrency, settings, tokens):
    """1,000 blocks are 200 for each of five requests, of which compression keeps 112 at least."""
    config = deepcopy(vllm_config)
    config.model_config.hf_text_config.layer_types = ["sliding_attention", "full_attention"]
    config.model_config.max_model_len = 112 * 16 * 2
    config.cache_config.num_gpu_blocks = 1000
    config.cache_config.kv_cache_max_concurrency = concurrency
    room = Room.of(config, MixedDimConfig(**settings), on_gpu=False)
    assert room.tokens == tokens
