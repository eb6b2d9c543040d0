import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.formats import PageGeometry, parse_format
from mdkv_vllm.core.packing import pack_list, unpack_list
from mdkv_vllm.core.quantize import dequantize, quantize

names = st.sampled_from(["full", "r8", "r16", "i8", "i4", "i2", "r16i8", "r8i4", "r16i2"])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(names, dtypes, st.sampled_from([32, 64, 80, 128]), st.integers(0, 300))
def test_round_trip(name, dtype, head_size, tokens):
    geometry = PageGeometry(16, head_size, dtype)
    fmt = parse_format(name, geometry)
    keys, values = torch.randn(2, tokens, fmt.rank)
    pages = pack_list(keys, values, fmt, geometry)
    assert pages.shape == (fmt.pages(tokens), geometry.page_bytes)
    for read, written in zip(
        unpack_list(pages, tokens, fmt, geometry), (keys, values), strict=True
    ):
        if fmt.quantized:
            codes, scales = quantize(written, fmt.bits)
            expected = dequantize(codes, scales, fmt.zero)
        else:
            expected = written.to(dtype).float()
        assert torch.equal(read, expected)


@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-4), (4, 0.014), (2, 0.13)])
def test_quantization_error_is_near_the_gaussian_optimum(bits, limit):
    vectors = torch.randn(4000, 64)
    codes, scales = quantize(vectors, bits)
    zero = {8: 128.0, 4: 7.5, 2: 1.5}[bits]
    error = (dequantize(codes, scales, zero) - vectors).square().mean()
    assert error < limit


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zero_vectors_stay_finite_and_zero(bits):
    codes, scales = quantize(torch.zeros(3, 16), bits)
    zero = {8: 128.0, 4: 7.5, 2: 1.5}[bits]
    assert torch.equal(dequantize(codes, scales, zero), torch.zeros(3, 16))


def test_int8_error_is_at_most_half_a_step_of_the_largest_element():
    vectors = torch.randn(100, 64) * torch.logspace(-3, 3, 100).unsqueeze(1)
    codes, scales = quantize(vectors, 8)
    error = (dequantize(codes, scales, 128.0) - vectors).abs().amax(1)
    assert torch.all(error <= 0.505 * vectors.abs().amax(1) / 127 * 1.01)
