"""Prefill against attention computed in float64.

vLLM's CPU kernel and torch's run as they are. FlashAttention and xformers run on GPUs only: here
plain torch carries out the calls that we make to them, so what is tested is the calls.
"""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from mdkv_vllm.config import ConfigError
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.kernels.cpu.cache import store_kv
from mdkv_vllm.kernels.interface import Chunk, ReadConfig
from mdkv_vllm.plugin.prefill.choose import choose_prefill
from mdkv_vllm.plugin.prefill.chunks import tokens_of
from mdkv_vllm.plugin.prefill.cpu import CpuPrefill, CpuStep
from mdkv_vllm.plugin.prefill.sdpa import SdpaPrefill, SdpaStep

current_platform.import_kernels()

BLOCK = 16


def flash_attn_varlen_func(
    *, q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    block_table, fa_version,
):  # fmt: skip
    """FlashAttention's paged attention: K and V ``[blocks, block_size, kv_heads, head_size]``."""
    assert causal
    assert fa_version == 3
    assert k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
    assert max_seqlen_k == int(seqused_k.max())
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    for i, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys, values = (
            side[block_table[i].long()].flatten(0, 1)[:length].double() for side in (k, v)
        )
        context = length - (rows.stop - rows.start)
        out[rows] = expected_attention(q[rows], keys, values, context, softmax_scale).to(out.dtype)


def memory_efficient_attention_forward(query, key, value, attn_bias, scale):
    """xformers' attention with grouped heads: ``[1, tokens, kv_heads, group, head_size]``."""
    assert key.stride(3) == 0, "the group's copies must cost nothing"
    bias = attn_bias.materialize((query.shape[1], key.shape[1])).double()
    scores = torch.einsum("bqhgd,bkhgd->bhgqk", query.double(), key.double()) * scale + bias
    result = torch.einsum("bhgqk,bkhgd->bqhgd", scores.softmax(-1), value.double())
    return result.to(query.dtype)


@pytest.fixture
def flash(monkeypatch):
    module = ModuleType("vllm.vllm_flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    from mdkv_vllm.plugin.prefill import flash as ours

    monkeypatch.setattr(ours, "get_flash_attn_version", lambda **_: 3)
    return ours.FlashPrefill(64)


@pytest.fixture
def xformers(monkeypatch):
    from mdkv_vllm.plugin.prefill import xformers as ours

    monkeypatch.setattr(
        ours, "memory_efficient_attention_forward", memory_efficient_attention_forward
    )
    return ours.XformersPrefill()


@pytest.fixture
def tiled(monkeypatch):
    """torch's attention a few rows at a time."""
    from mdkv_vllm.plugin.prefill import sdpa as ours

    monkeypatch.setattr(ours, "SCORE_ELEMENTS", 6 * 300 * 7)
    return ours.SdpaPrefill()


@pytest.fixture
def prefill(request):
    if isinstance(request.param, str):
        return request.getfixturevalue(request.param)
    return request.param()


def expected_attention(query, keys, values, context, scale):
    """Float64 causal attention of ``[chunk, q_heads, d]`` to ``[total, kv_heads, d]``."""
    heads = keys.shape[1]
    grouped = query.double().unflatten(1, (heads, -1))
    scores = torch.einsum("qhgd,thd->hgqt", grouped, keys) * scale
    hidden = torch.ones(len(query), len(keys), dtype=torch.bool).triu(context + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hgqt,thd->qhgd", weights, values).flatten(1, 2)


@pytest.mark.parametrize(("has_flash", "calls"), [(True, [40]), (False, [7, 7, 7, 7, 7, 5])])
def test_torch_gets_the_whole_chunk_where_it_writes_no_scores_out(
    tiled, monkeypatch, has_flash, calls
):
    from mdkv_vllm.plugin.prefill import sdpa as ours

    asked, counts = [], []

    def can_use_flash_attention(call):
        asked.append((call.query.shape, call.key.shape, call.enable_gqa))
        return has_flash

    def attention(query, *args, **kwargs):
        counts.append(query.shape[2])
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(ours, "can_use_flash_attention", can_use_flash_attention)
    monkeypatch.setattr(ours, "scaled_dot_product_attention", attention)
    cache = torch.randn(20, 2, BLOCK, 128)
    blocks = torch.randperm(20)[None, :].int()
    query, own = torch.randn(42, 6, 64), torch.empty(42, 2, 64)
    output = torch.zeros_like(query)

    step = tiled.prepare([Chunk(1, 41, 260, 0)], blocks)
    step.attend(query, own, own, cache, 0, 0.1, output)

    assert asked == [((1, 6, 40, 64), (1, 2, 300, 64), True)]
    assert counts == calls
    keys, values = cache[blocks[0].long()].transpose(1, 2).flatten(0, 1)[:300].split(64, -1)
    expected = expected_attention(query[1:41], keys.double(), values.double(), 260, 0.1)
    torch.testing.assert_close(output[1:41].double(), expected, atol=1e-5, rtol=0)
    assert not output[[0, 41]].any()


@pytest.mark.parametrize(
    "prefill", [CpuPrefill, SdpaPrefill, "tiled", "flash", "xformers"], indirect=True
)
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
    if dtype != cache_dtype and not isinstance(prefill, CpuPrefill | SdpaPrefill):
        pytest.skip("on GPUs the cache has the model's type")
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
    prefill.prepare(batch, block_table).attend(query, key, value, cache, 0, scale, output)
    others = torch.ones(at, dtype=torch.bool)
    for chunk, (keys, values) in zip(batch, inputs, strict=True):
        rows = slice(chunk.start, chunk.stop)
        seen = (x.to(cache_dtype).double() for x in (keys, values))
        expected = expected_attention(query[rows], *seen, chunk.context, scale)
        torch.testing.assert_close(output[rows].double(), expected, rtol=tolerance, atol=tolerance)
        others[rows] = False
    assert (output[others] == 7.0).all(), "tokens of other requests were written"


def test_flash_reads_no_number_on_the_device(flash):
    """On torch's meta device there are none to read."""
    table = torch.zeros(4, 8, dtype=torch.int32, device="meta")
    step = flash.prepare([Chunk(0, 3, 5, 1), Chunk(4, 9, 0, 3)], table)
    assert step.block_table.shape == (2, 8)
    assert (step.longest_query, step.longest) == (5, 8)


def test_flash_attention_takes_what_we_pass():
    """The stand-in above has the names of the real function, which cannot be imported here."""
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    source = (folder / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    real = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    names = {argument.arg for argument in real.args.args}
    asked = set(inspect.signature(flash_attn_varlen_func).parameters)
    assert asked <= names


def test_tokens_of_chunks():
    side_by_side = [Chunk(2, 5, 0, 0), Chunk(5, 6, 9, 1)]
    assert tokens_of(side_by_side, torch.device("cpu")) == slice(2, 6)
    apart = [Chunk(0, 2, 0, 0), Chunk(3, 5, 0, 1)]
    assert tokens_of(apart, torch.device("cpu")).tolist() == [0, 1, 3, 4]


def read_config(head_size=64):
    geometry = PageGeometry(BLOCK, head_size, torch.bfloat16)
    layout = LeaseLayout(geometry, parse_formats(("i4", "full"), geometry), 2, 2)
    cache = torch.zeros(2, 4, BLOCK, 2 * head_size, dtype=torch.bfloat16)
    return ReadConfig(cache, layout, None)


@pytest.mark.parametrize("asked", ["flash", "xformers"])
def test_what_needs_a_gpu_is_refused_on_cpus(asked):
    with pytest.raises(ConfigError, match=rf"mixeddim.prefill is '{asked}'.*allowed.*sdpa"):
        choose_prefill(asked, read_config(), torch.bfloat16)


@pytest.mark.parametrize(("asked", "kind"), [("auto", CpuStep), ("sdpa", SdpaStep)])
def test_choice_on_cpus(asked, kind):
    chosen = choose_prefill(asked, read_config(), torch.bfloat16)[1]
    assert isinstance(chosen.prepare([Chunk(0, 2, 0, 0)], torch.zeros(1, 1).int()), kind)
