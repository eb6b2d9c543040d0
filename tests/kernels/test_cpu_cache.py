"""Full-dimension tokens into and out of the cache."""

import pytest
import torch

from mdkv_vllm.kernels.cpu.cache import load_kv, store_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_view(dtype: torch.dtype, blocks: int, heads: int, block_size: int, head_size: int):
    """One layer of a cache in which all layers of a block are contiguous."""
    kv_cache = torch.full((blocks, 3 * heads, block_size, 2 * head_size), torch.nan, dtype=dtype)
    return kv_cache, kv_cache[:, heads : 2 * heads]


def slots_for(tokens: int, limit: int) -> torch.Tensor:
    slots = torch.randperm(limit)[: tokens + 3]
    slots[::5] = -1
    return slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_size"), [(1, 64), (40, 80), (40, 8), (0, 128)])
def test_store(dtype: torch.dtype, cache_dtype: torch.dtype, tokens: int, head_size: int):
    torch.manual_seed(tokens)
    blocks, heads, block_size = 7, 3, 16
    kv_cache, view = layer_view(cache_dtype, blocks, heads, block_size, head_size)
    # Slices of one fused projection, as models pass them.
    fused = torch.randn(tokens, 4 * heads * head_size).to(dtype)
    key = fused[:, : heads * head_size].view(tokens, heads, head_size)
    value = fused[:, -heads * head_size :].view(tokens, heads, head_size)
    slots = slots_for(tokens, blocks * block_size)
    expected = kv_cache.clone()
    for t in range(tokens):
        block, offset = divmod(int(slots[t]), block_size)
        if slots[t] >= 0:
            expected[block, heads : 2 * heads, offset] = torch.cat((key[t], value[t]), -1).to(
                cache_dtype
            )
    store_kv(key, value, view, slots)
    torch.testing.assert_close(kv_cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_torch(dtype: torch.dtype):
    """Ties, subnormals, overflow, infinities and NaN."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = torch.arange(4096, dtype=torch.int32) * (1 << 12) + 0x33000000
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 1e-45])
    rows = torch.cat((bits.view(torch.float32), ties.view(torch.float32), special.repeat(64)))
    key = rows.view(-1, 1, 64)
    _, view = layer_view(dtype, key.shape[0] // 16 + 1, 1, 16, 64)
    store_kv(key, key, view, torch.arange(key.shape[0]))
    stored = view.flatten(1, 2).reshape(-1, 128)[: key.shape[0], :64].flatten()
    torch.testing.assert_close(stored, rows.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 16, 77])
def test_load(dtype: torch.dtype, cache_dtype: torch.dtype, index_dtype: torch.dtype, tokens: int):
    torch.manual_seed(tokens)
    blocks, heads, block_size, head_size = 9, 2, 16, 72
    kv_cache, view = layer_view(cache_dtype, blocks, heads, block_size, head_size)
    kv_cache.copy_(torch.randn(kv_cache.shape))
    ids = torch.randperm(blocks)[:5].to(index_dtype)
    keys = torch.full((heads, tokens, head_size), torch.nan, dtype=dtype)
    values = torch.full((heads, tokens + 2, head_size), torch.nan, dtype=dtype)[:, 2:]
    load_kv(view, ids, tokens, keys, values)
    gathered = view[ids.long()].transpose(0, 1).flatten(1, 2)[:, :tokens].to(dtype)
    assert torch.equal(keys, gathered[..., :head_size])
    assert torch.equal(values, gathered[..., head_size:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_every_value(dtype: torch.dtype):
    """Every bit pattern of a 16-bit type, converted to float32."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    cache = every.view(-1, 1, 16, 64)
    tokens = cache.shape[0] * 16
    keys, values = torch.empty(1, tokens, 32), torch.empty(1, tokens, 32)
    load_kv(cache, torch.arange(cache.shape[0]), tokens, keys, values)
    both = torch.cat((keys, values), -1).flatten()
    torch.testing.assert_close(both, every.float(), rtol=0, atol=0, equal_nan=True)


def test_wrong_arguments_are_named():
    _, view = layer_view(torch.float32, 2, 2, 16, 64)
    rows, slots = torch.zeros(1, 2, 64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="key: "):
        store_kv(rows[:, :1], rows, view, slots)
    with pytest.raises(RuntimeError, match="value: "):
        store_kv(rows, rows.half(), view, slots)
    with pytest.raises(RuntimeError, match="slot_mapping: "):
        store_kv(rows, rows, view, slots.int())
    with pytest.raises(RuntimeError, match="slot_mapping: slot 32 of 32"):
        store_kv(rows, rows, view, slots + 32)
    out = torch.zeros(2, 4, 64)
    with pytest.raises(RuntimeError, match="num_tokens: "):
        load_kv(view, slots, 17, out, out)
    with pytest.raises(RuntimeError, match="keys: "):
        load_kv(view, slots, 5, out, out)
    with pytest.raises(RuntimeError, match="block_ids: block 2 of 2"):
        load_kv(view, slots + 2, 4, out, out)
