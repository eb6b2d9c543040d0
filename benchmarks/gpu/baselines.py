"""Kernels for a full cache: torch's own, and others where they can be imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mdkv_vllm.core.reference import attend

from .loads import BLOCK_SIZE, Load

Step = Callable[[int], torch.Tensor]
"""Attends with one set of requests; ``[batch, q_heads, head_size]``, or with dimensions of 1."""
FLASH_ATTENTION_3 = "FLASH_ATTENTION_3"
"""Environment variable: vLLM's ``_vllm_fa3_C.abi3.so``."""
WORKSPACE_BYTES = 128 << 20
MAX_ERROR = 2e-2
"""Relative error of a kernel that is called as it is meant to be called."""


@dataclass(frozen=True)
class FullCache:
    """Sets of requests with contiguous caches, which is as good as it gets for a kernel.

    Attributes:
        load: the batch.
        queries: ``[sets, batch, q_heads, head_size]``.
        keys: ``[sets, batch, tokens, kv_heads, head_size]``.
        values: same.
    """

    load: Load
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def random(cls, load: Load, sets: int, generator: torch.Generator) -> FullCache:
        """Of normal numbers, on the generator's device."""
        heads = load.heads

        def normal(*shape: int) -> torch.Tensor:
            sizes = (sets, load.batch, *shape)
            empty = torch.empty(sizes, dtype=heads.dtype, device=generator.device)
            return empty.normal_(generator=generator)

        cache = (load.tokens, heads.kv_heads, heads.head_size)
        return cls(load, normal(heads.q_heads, heads.head_size), normal(*cache), normal(*cache))

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.load.heads.head_size**-0.5

    def error(self, output: torch.Tensor, index: int) -> float:
        """Relative error of the last request's output of one set, the worst head's."""
        group = self.load.heads.group
        got = output.reshape(self.queries.shape[1:])[-1].double()
        expected = torch.cat(
            [
                attend(
                    self.queries[index, -1, head * group : (head + 1) * group],
                    self.keys[index, -1, :, head],
                    self.values[index, -1, :, head],
                    self.scale,
                )[0]
                for head in range(self.load.heads.kv_heads)
            ]
        )
        return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def torch_sdpa(cache: FullCache, backend: SDPBackend) -> Step:
    """One of torch's attention kernels."""

    def step(index: int) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                cache.queries[index].unsqueeze(2),
                cache.keys[index].transpose(1, 2),
                cache.values[index].transpose(1, 2),
                scale=cache.scale,
                enable_gqa=True,
            )

    return step


def flash_attention(cache: FullCache, module: str) -> Step:
    """FlashAttention's decoding kernel, of version 2 or 3."""
    attention = importlib.import_module(module).flash_attn_with_kvcache
    lengths = torch.full((cache.load.batch,), cache.load.tokens, dtype=torch.int32).to(
        cache.keys.device
    )

    def step(index: int) -> torch.Tensor:
        return attention(
            cache.queries[index].unsqueeze(1),
            cache.keys[index],
            cache.values[index],
            cache_seqlens=lengths,
            softmax_scale=cache.scale,
        )

    return step


def vllm_flash_attention_3(cache: FullCache, paged: bool) -> Step:
    """FlashAttention 3 as vLLM calls it to decode, from the extension module of its wheel.

    Args:
        cache: the requests.
        paged: in pages of vLLM's block size, as vLLM has them; otherwise contiguous.

    Raises:
        ImportError: :data:`FLASH_ATTENTION_3` names no file.
    """
    path = os.environ.get(FLASH_ATTENTION_3)
    if path is None or not os.path.exists(path):
        raise ImportError(f"{FLASH_ATTENTION_3}={path}")
    torch.ops.load_library(path)
    ops, load, heads = torch.ops._vllm_fa3_C, cache.load, cache.load.heads
    device, batch = cache.keys.device, load.batch
    lengths = torch.full((batch,), load.tokens, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    table = torch.arange(batch * load.tokens // BLOCK_SIZE, dtype=torch.int32, device=device)
    schedule = ops.get_scheduler_metadata(
        batch, 1, load.tokens, heads.q_heads, heads.kv_heads, heads.head_size, heads.head_size,
        heads.dtype, lengths, starts, None, None, None, None, BLOCK_SIZE if paged else None, 0,
        True, -1, -1, False, 0, None, 0,
    )  # fmt: skip
    pages = (-1, BLOCK_SIZE, heads.kv_heads, heads.head_size)

    def step(index: int) -> torch.Tensor:
        keys, values = cache.keys[index], cache.values[index]
        if paged:
            keys, values = keys.view(pages), values.view(pages)
        return ops.fwd(
            cache.queries[index], keys, values, None, None, None, None, starts, None, None, None,
            lengths, 1, load.tokens, table.view(batch, -1) if paged else None, None, None, None,
            None, None, None, None, None, cache.scale, True, -1, -1, 0.0, True, schedule, 0, None,
            0, None, 1, 0, None,
        )[0]  # fmt: skip

    return step


def flashinfer(cache: FullCache) -> Step:
    """FlashInfer's kernel for pages, planned once: all sets have the same lengths."""
    module = importlib.import_module("flashinfer")
    load, device = cache.load, cache.keys.device
    heads, pages = load.heads, load.tokens // BLOCK_SIZE
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads.group >= 4
    )
    wrapper.plan(
        torch.arange(load.batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(load.batch * pages, dtype=torch.int32, device=device),
        torch.full((load.batch,), BLOCK_SIZE, dtype=torch.int32, device=device),
        heads.q_heads,
        heads.kv_heads,
        heads.head_size,
        BLOCK_SIZE,
        q_data_type=heads.dtype,
        kv_data_type=heads.dtype,
        sm_scale=cache.scale,
    )

    def step(index: int) -> torch.Tensor:
        shape = (load.batch * pages, BLOCK_SIZE, heads.kv_heads, heads.head_size)
        paged = cache.keys[index].view(shape), cache.values[index].view(shape)
        return wrapper.run(cache.queries[index], paged)

    return step


def xformers(cache: FullCache) -> Step:
    """Memory-efficient attention of xformers, groups as a dimension of their own."""
    attention = importlib.import_module("xformers.ops").memory_efficient_attention_forward
    heads = cache.load.heads

    def step(index: int) -> torch.Tensor:
        grouped = (-1, -1, -1, heads.group, -1)
        return attention(
            cache.queries[index].unflatten(1, (heads.kv_heads, heads.group)).unsqueeze(1),
            cache.keys[index].unsqueeze(3).expand(grouped),
            cache.values[index].unsqueeze(3).expand(grouped),
            scale=cache.scale,
        )

    return step


VLLM_KERNELS = ("FlashAttention 3, contiguous", "FlashAttention 3, paged")
BASELINES: dict[str, Callable[[FullCache], Step]] = {
    VLLM_KERNELS[0]: lambda cache: vllm_flash_attention_3(cache, paged=False),
    VLLM_KERNELS[1]: lambda cache: vllm_flash_attention_3(cache, paged=True),
    "torch flash": lambda cache: torch_sdpa(cache, SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": lambda cache: torch_sdpa(cache, SDPBackend.CUDNN_ATTENTION),
    "FlashAttention 2": lambda cache: flash_attention(cache, "flash_attn"),
    "FlashAttention 3": lambda cache: flash_attention(cache, "flash_attn_interface"),
    "FlashInfer": flashinfer,
    "xformers": xformers,
}
