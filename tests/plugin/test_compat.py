"""Fails when a private symbol of vLLM that we use changes, or has become public."""

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm import _custom_ops
from vllm.v1.attention.backends import cpu_attn

from mdkv_vllm.plugin.compat import (
    asks_no_backend_for_its_block_size,
    reuse_first,
    step_activations,
)


def test_attention_isa_is_still_ours_to_choose():
    assert list(inspect.signature(cpu_attn._get_attn_isa).parameters)[:3] == [
        "dtype",
        "block_size",
        "head_size",
    ]
    chosen = inspect.signature(_custom_ops.cpu_attn_get_scheduler_metadata).parameters["isa"]
    assert chosen.default is inspect.Parameter.empty, "vLLM now chooses: compat can go"


def test_managers_free_ranges_of_blocks():
    from vllm.v1.core import single_type_kv_cache_manager as managers

    manager = managers.SingleTypeKVCacheManager
    parameters = inspect.signature(manager._remove_blocks_in_range).parameters
    assert list(parameters) == ["self", "request_id", "first_block", "last_block"]


def test_blocks_take_a_hash_of_ours():
    from vllm.v1.core.block_pool import BlockPool

    parameters = inspect.signature(BlockPool._insert_block_hash).parameters
    assert list(parameters) == ["self", "block_hash_with_group_id", "block", "num_tokens"]


def test_free_blocks_may_be_put_first():
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=16)
    taken = pool.get_new_blocks(3)
    pool.free_blocks(taken[:2])
    reuse_first(pool, [pool.null_block, *taken])  # one is in use
    assert pool.get_num_free_blocks() == 6
    assert pool.get_new_blocks(2) == taken[:2]


def test_who_chooses_the_block_size():
    """vLLM 0.32's CPU platform asks no backend; where this fails, the shim can go or must stay."""
    from vllm.platforms.cpu import CpuPlatform

    source = inspect.getsource(CpuPlatform.update_block_size_for_backend)
    asks = "_preferred_block_size_for_backends" in source
    assert asks is not asks_no_backend_for_its_block_size("cpu")
    assert not asks_no_backend_for_its_block_size("cuda")


def test_a_pipeline_stage_on_cpus_is_not_warmed_up_where_nothing_is_compiled():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    compiles = inspect.getsource(CPUModelRunner.warming_up_model)
    assert "mode == CompilationMode.NONE" in compiles, "compat can go"
    assert "self.model.make_empty_intermediate_tensors(" in inspect.getsource(
        GPUModelRunner._dummy_run
    )


def test_activations_of_a_step():
    worker = SimpleNamespace()
    assert step_activations(worker, True) == 0  # nothing was profiled
    worker.peak_activation_memory, worker.cudagraph_memory_estimate = 10, 4
    assert step_activations(worker, True) == 6
    assert step_activations(worker, False) == 10


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
