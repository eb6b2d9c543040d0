"""Fails when a private symbol of vLLM that we use changes, or has become public."""

import inspect

import pytest

pytest.importorskip("vllm")

from vllm import _custom_ops
from vllm.v1.attention.backends import cpu_attn


def test_attention_isa_is_still_ours_to_choose():
    assert list(inspect.signature(cpu_attn._get_attn_isa).parameters)[:3] == [
        "dtype",
        "block_size",
        "head_size",
    ]
    chosen = inspect.signature(_custom_ops.cpu_attn_get_scheduler_metadata).parameters["isa"]
    assert chosen.default is inspect.Parameter.empty, "vLLM now chooses: compat can go"


def test_what_only_gpus_run_still_has_its_names():
    """Attributes that no run on a CPU reaches; read off vLLM's source."""
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.worker import gpu_worker

    assert "self.peak_activation_memory = (" in inspect.getsource(
        gpu_worker.Worker.determine_available_memory
    )
    assert "layer._k_scale" in inspect.getsource(attention)
    taken = inspect.signature(_custom_ops.reshape_and_cache_flash).parameters
    assert list(taken) == [
        "key",
        "value",
        "key_cache",
        "value_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
        "v_scale",
    ]
