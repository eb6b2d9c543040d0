"""The Triton compression kernels compiled for GPUs that are not there."""

from pathlib import Path

import pytest
import torch

from mdkv_vllm.core.formats import PageGeometry, parse_format

pytest.importorskip("triton")

from compiler import SHARED_LIMIT, compile_signature

from mdkv_vllm.triton_kernels import quantise, window_scores
from mdkv_vllm.triton_kernels.elements import element_type
from mdkv_vllm.triton_kernels.pack import PackShape, pack_list_page
from mdkv_vllm.triton_kernels.quantise import gaussian_step, read_back, tile_vectors
from mdkv_vllm.triton_kernels.shapes import padded
from mdkv_vllm.triton_kernels.window_scores import row_log_sums, tile_sides, token_sums

CAPABILITIES = tuple(SHARED_LIMIT)
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_strided(kernel, pointers, constants, capability):
    """Compile with those pointer types; strides are multiples of 16, other integers are any."""

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in pointers:
            return f"*{pointers[argument]}"
        return "fp32" if argument == "scale" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    strides = tuple(argument for argument in kernel.arg_names if argument.endswith("stride"))
    compiled = compile_signature(
        kernel, signature, constants, capability, multiples_of_16=strides
    )
    assert compiled.local == compiled.stack == 0, f"spills: {compiled.registers} registers"
    assert compiled.shared <= SHARED_LIMIT[capability]
    return compiled


def check_row_log_sums(rank, rows, dtype, capability):
    tile_rows, tile_tokens = tile_sides(rows, rank)
    constants = {"GROUP": 4, "DIMS": rank, "PADDED": padded(rank), "TYPE": element_type(dtype)}
    constants |= {"ROWS": tile_rows, "TOKENS": tile_tokens, "SHARE": 512}
    types = dict.fromkeys(("queries", "keys"), NAMES[constants["TYPE"].name_]) if False else {}
    types = dict.fromkeys(("queries", "keys"), NAMES[str(dtype).removeprefix("torch.")])
    return compile_strided(row_log_sums, types | {"log_sums": "fp32"}, constants, capability)


def check_token_sums(rank, other_rank, rows, dtype, other_dtype, together, capability):
    tile_rows, tile_tokens = tile_sides(rows, rank, other_rank)
    constants = {"DIMS": rank, "PADDED": padded(rank), "TYPE": element_type(dtype)}
    constants |= {"OTHER_DIMS": other_rank, "OTHER_PADDED": padded(max(1, other_rank))}
    constants |= {"OTHER_TYPE": element_type(other_dtype), "TOGETHER": together}
    constants |= {"ROWS": tile_rows, "TOKENS": tile_tokens}
    floats = ("log_sums", "other_log_sums", "mass", "moved")
    types = dict.fromkeys(floats, "fp32")
    types |= dict.fromkeys(("queries", "keys"), NAMES[str(dtype).removeprefix("torch.")])
    other = NAMES[str(other_dtype).removeprefix("torch.")]
    types |= dict.fromkeys(("other_queries", "other_keys"), other)
    return compile_strided(token_sums, types, constants, capability)


def check_read_back(rank, bits, dtype, capability):
    constants = {"RANK": rank, "PADDED": padded(rank), "BITS": bits}
    constants |= {"STEP": gaussian_step(bits), "TOKENS": tile_vectors(padded(rank))}
    types = {"read": "fp32", "error": "fp32"}
    types |= dict.fromkeys(("keys", "values"), NAMES[str(dtype).removeprefix("torch.")])
    return compile_strided(read_back, types, constants, capability)


def check_pack(name, geometry, dtype, capability):
    shape = PackShape(
        parse_format(name, geometry), element_type(geometry.dtype), geometry.page_bytes
    )
    constants = {"LIST": shape, "FORMAT": 1, "FORMATS": 3}
    types = {"order": "i64", "lists": "i64", "pages": "u8"}
    types |= dict.fromkeys(("keys", "values"), NAMES[str(dtype).removeprefix("torch.")])
    return compile_strided(pack_list_page, types, constants, capability)


if __name__ == "__main__":
    import time
    import sys
    def show(what, f, *a):
        t = time.time()
        try:
            c = f(*a)
            print(what, a, c.registers, c.shared, f"{time.time()-t:.1f}s", flush=True)
        except AssertionError as e:
            print(what, a, "FAIL", e, flush=True)
    b, f = torch.bfloat16, torch.float32
    for cap in CAPABILITIES:
        for rank in (64, 80, 96, 128, 256):
            for d in (b, f):
                show("rows", check_row_log_sums, rank, 128, d, cap)
        for rank, other in ((64, 64), (80, 80), (128, 32), (128, 128), (256, 256), (128, 0)):
            for d in (b, f):
                show("sums", check_token_sums, rank, other, 128, d, f, False, cap)
        show("sums", check_token_sums, 128, 128, 128, b, b, True, cap)
        for rank in (64, 80, 128, 256):
            for bits in (8, 4, 2):
                show("read", check_read_back, rank, bits, f, cap)
        for name in ("r16", "r32i8", "i8", "i4", "i2", "full"):
            for size in (64, 80, 128, 256):
                show("pack", check_pack, name, PageGeometry(16, size, b), f, cap)
