"""Prefill on CPU, by vLLM's kernel and by torch's, against attention computed in float64."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from mdkv_vllm.config import ConfigError
from mdkv_vllm.ops.cpu import store_kv
from mdkv_vllm.plugin.prefill import Chunk, tokens_of
from mdkv_vllm.plugin.prefill.choose import choose_prefill
from mdkv_vllm.plugin.prefill.cpu import CpuPrefill
from mdkv_vllm.plugin.prefill.sdpa import SdpaPrefill

current_platform.import_kernels()

BLOCK = 16


def expected_attention(query, keys, values, context, scale):
    """Float64 causal attention of ``[chunk, q_heads, d]`` to ``[total, kv_heads, d]``."""
    heads = keys.shape[1]
    grouped = query.double().unflatten(1, (heads, -1))
    scores = torch.einsum("qhgd,thd->hgqt", grouped, keys) * scale
    hidden = torch.ones(len(query), len(keys), dtype=torch.bool).triu(context + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hgqt,thd->qhgd", weights, values).flatten(1, 2)


@pytest.mark.parametrize("prefill", [CpuPrefill, SdpaPrefill])
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(
    "chunks", [[(0, 2)], [(0, 300)], [(17, 40), (0, 5)], [(256, 129)], [(500, 3), (16, 16)]]
)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.float32, torch.bfloat16, 1e-4),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_chunks_with_context(prefill, head_size, chunks, dtype, cache_dtype, tolerance):
    """A batch of chunks, with a token of another request between any two."""
    heads, group, scale = 2, 3, 0.1
    width = max(-(-sum(chunk) // BLOCK) for chunk in chunks)
    cache = torch.full((160, heads, BLOCK, 2 * head_size), torch.nan, dtype=cache_dtype)
    block_table = torch.randperm(160)[: len(chunks) * width].int().view(len(chunks), width)
    batch, inputs, at = [], [], 1
    for row, (context, count) in enumerate(chunks):
        keys, values = torch.randn(2, context + count, heads, head_size).to(dtype)
        positions = torch.arange(context + count)
        slots = block_table[row].long()[positions // BLOCK] * BLOCK + positions % BLOCK
        store_kv(keys, values, cache, slots)
        batch.append(Chunk(at, at + count, context, row))
        inputs.append((keys, values))
        at += count + 1
    query = torch.randn(at, heads * group, head_size).to(dtype)
    key, value = torch.full((2, at, heads, head_size), torch.nan, dtype=dtype)
    for chunk, (keys, values) in zip(batch, inputs, strict=True):
        key[chunk.start : chunk.stop] = keys[chunk.context :]
        value[chunk.start : chunk.stop] = values[chunk.context :]
    output = torch.full_like(query, 7.0)
    prefill().prepare(batch, block_table).attend(query, key, value, cache, scale, output)
    others = torch.ones(at, dtype=torch.bool)
    for chunk, (keys, values) in zip(batch, inputs, strict=True):
        rows = slice(chunk.start, chunk.stop)
        seen = (x.to(cache_dtype).double() for x in (keys, values))
        expected = expected_attention(query[rows], *seen, chunk.context, scale)
        torch.testing.assert_close(output[rows].double(), expected, rtol=tolerance, atol=tolerance)
        others[rows] = False
    assert (output[others] == 7.0).all(), "tokens of other requests were written"


def test_tokens_of_chunks():
    side_by_side = [Chunk(2, 5, 0, 0), Chunk(5, 6, 9, 1)]
    assert tokens_of(side_by_side, torch.device("cpu")) == slice(2, 6)
    apart = [Chunk(0, 2, 0, 0), Chunk(3, 5, 0, 1)]
    assert tokens_of(apart, torch.device("cpu")).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("asked", ["flash", "xformers"])
def test_what_needs_a_gpu_is_refused_on_cpus(asked):
    with pytest.raises(ConfigError, match=rf"mixeddim.prefill is '{asked}'.*allowed.*sdpa"):
        choose_prefill(asked, torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("asked", "kind"), [("auto", CpuPrefill), ("sdpa", SdpaPrefill)]
)  # fmt: skip
def test_choice_on_cpus(asked, kind):
    assert isinstance(choose_prefill(asked, torch.device("cpu"), torch.bfloat16, 64)[1], kind)
