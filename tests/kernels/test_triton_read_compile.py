"""Reading leases back compiles for GPUs, without one, and fits them."""

import pytest
import torch

from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout

pytest.importorskip("triton")

from compiler import SHARED_LIMIT, compile_signature

from mdkv_vllm.kernels.interface import SOURCE_FIELDS
from mdkv_vllm.kernels.triton.elements import element_type
from mdkv_vllm.kernels.triton.read import ReadShape
from mdkv_vllm.kernels.triton.read_kernels import read_sources
from mdkv_vllm.testing.leases import EVERY_FORMAT

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = dict.fromkeys(("block_table", "fields", "targets"), "i32")
POINTERS |= dict.fromkeys(("basis_keys", "basis_values"), "fp32")
POINTERS |= dict.fromkeys(("cache", "keys", "values"), "u8")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(capability, head_size, names, dtype, prompt_rank):
    geometry = PageGeometry(16, head_size, dtype)
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, 32, 8, prompt_rank)
    constants = {
        "SHAPE": ReadShape(layout, 1, prompt_rank or formats.basis_rank),
        "FIELDS": SOURCE_FIELDS,
        "OUT": element_type(dtype),
    }
    types = POINTERS | {"hadamard": "fp32" if dtype == FP32 else "fp16"}

    def kind(argument):
        if argument in constants:
            return "constexpr"
        return f"*{types[argument]}" if argument in types else "i32"

    signature = {argument: kind(argument) for argument in read_sources.arg_names}
    warps = constants["SHAPE"].num_warps
    return compile_signature(read_sources, signature, constants, capability, warps)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("head_size", "names", "dtype", "prompt_rank"),
    [
        (64, ("i4", "i8", "full"), BF16, 0),
        (80, EVERY_FORMAT, FP16, 0),
        (128, EVERY_FORMAT, BF16, 0),
        (128, EVERY_FORMAT, BF16, 32),
        (256, ("i4", "i2", "i8", "full"), BF16, 0),
    ],
)
def test_reading_fits(capability, head_size, names, dtype, prompt_rank):
    made = compiled(capability, head_size, names, dtype, prompt_rank)
    assert made.shared <= SHARED_LIMIT[capability]
    assert made.local == made.stack == 0, f"spills: {made.stack} bytes, {made.registers} registers"


def test_a_float32_cache_compiles():
    """It may spill: that is not what servers on GPUs have."""
    compiled(90, 128, ("i4", "i8", "full"), FP32, 0)
    compiled(75, 64, ("i4", "i8", "full"), FP16, 0)
