"""Prefill through vLLM's kernel against attention computed in float64."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from mdkv_vllm.ops.cpu import store_kv
from mdkv_vllm.plugin.prefill import Prefill

current_platform.import_kernels()


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(("context", "chunk"), [(0, 2), (0, 300), (17, 40), (256, 129), (500, 3)])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.float32, torch.bfloat16, 1e-4),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_chunks_with_context(head_size, context, chunk, dtype, cache_dtype, tolerance):
    heads, group, total, block = 2, 3, context + chunk, 16
    keys, values = torch.randn(2, total, heads, head_size).to(dtype)
    query = torch.randn(chunk, heads * group, head_size).to(dtype)
    cache = torch.full((64, heads, block, 2 * head_size), torch.nan, dtype=cache_dtype)
    blocks = torch.randperm(64)[: -(-total // block)].int()
    positions = torch.arange(context)
    slots = blocks.long()[positions // block] * block + positions % block
    store_kv(keys[:context], values[:context], cache, slots)
    output = torch.full_like(query, torch.nan)
    prefill = Prefill(0, chunk, context, blocks)
    prefill.attend(query, keys[context:], values[context:], cache, 0.1, output)
    seen_keys, seen_values = (x.to(cache_dtype).double() for x in (keys, values))
    scores = torch.einsum("qhgd,thd->hgqt", query.double().unflatten(1, (heads, group)), seen_keys)
    hidden = torch.ones(chunk, total, dtype=torch.bool).triu(context + 1)
    weights = (scores * 0.1).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("hgqt,thd->qhgd", weights, seen_values).flatten(1, 2)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
