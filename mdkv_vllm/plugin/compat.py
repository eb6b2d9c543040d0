"""Every private or unstable name of vLLM that we use: why, and when it can go.

What differs between vLLM 0.32 and 0.33 is here too. ``tests/plugin/test_compat.py`` fails when one
of them changes or is no longer needed, on each version that it is run with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.worker.gpu_worker import Worker


def attention_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Name of the instruction set that vLLM's CPU attention kernel should use.

    Private because vLLM has no public name for the choice; can go when
    ``cpu_attention_with_kv_cache`` makes it itself.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, block_size, head_size)


def cache_scales(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """A layer's scales of cached keys and values, which vLLM's kernel that writes them wants.

    Private because backends of vLLM's own read them so; can go when the layer has public ones, or
    that kernel takes none for 16-bit caches.
    """
    return layer._k_scale, layer._v_scale


def remove_blocks(
    manager: SingleTypeKVCacheManager, request_id: str, first: int, last: int
) -> None:
    """Free the blocks ``first .. last - 1`` of a request's table, which become null blocks.

    Private because only vLLM's own sliding windows free in mid-request; can go when a manager may
    name ranges to free.
    """
    manager._remove_blocks_in_range(request_id, first, last)


def cache_block(
    block_pool: BlockPool, block: KVCacheBlock, block_hash: BlockHash, group_id: int
) -> None:
    """Cache a block of a lease under a hash, under which nobody looks for a full-size block.

    Private because vLLM hashes blocks by their tokens alone; can go when a manager may name a
    block's hash.
    """
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    key = make_block_hash_with_group_id(block_hash, group_id)
    block_pool._insert_block_hash(key, block, num_tokens=None)


def reuse_first(block_pool: BlockPool, blocks: Iterable[KVCacheBlock]) -> None:
    """Let free blocks be given away before all others; they keep their hash until then.

    Private because vLLM orders its free blocks by their last use alone; can go when a manager may
    say which of the blocks that it frees are worth less.
    """
    free = [block for block in blocks if block.ref_cnt == 0 and not block.is_null]
    for block in free:
        block_pool.free_block_queue.remove(block)
    block_pool.free_block_queue.prepend_n(free)


def step_activations(worker: Worker, estimates_graphs: bool) -> int:
    """Bytes that a step was seen to take for a moment while vLLM profiled its memory.

    Args:
        worker: vLLM's, after ``determine_available_memory``.
        estimates_graphs: whether CUDA graphs, which stay, are among them.

    Neither attribute is documented, and neither is set where vLLM takes the cache's size from a
    start-up plan it saved: then nothing is known, which is 0. Can go when vLLM offers the profile.
    """
    known = vars(worker)
    graphs = known.get("cudagraph_memory_estimate", 0) if estimates_graphs else 0
    return max(0, known.get("peak_activation_memory", 0) - graphs)


def asks_no_backend_for_its_block_size(device_type: str) -> bool:
    """Whether a platform sets its own default instead of ``get_preferred_block_size`` of a backend.

    vLLM 0.32 does on CPUs; can go with it.
    """
    from mdkv_vllm.plugin.registration import vllm_version

    return device_type == "cpu" and vllm_version().startswith("0.32.")


def make_stage_input(runner: Any) -> None:  # noqa: ANN401
    """Make the buffer in which a pipeline stage on CPUs gets what the stage before it computed.

    Private because vLLM makes it in a warm-up of the model, which its CPU build leaves out with
    ``--enforce-eager``: then the first step fails. Can go when it does not.

    Args:
        runner: vLLM's model runner, its model loaded.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )
