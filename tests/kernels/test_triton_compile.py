"""Every variant of the Triton kernels compiles for GPUs, without one, and fits them."""

from pathlib import Path

import pytest
import torch

from mdkv_vllm.core.formats import PageGeometry, parse_format, parse_formats
from mdkv_vllm.core.layout import LeaseLayout

pytest.importorskip("triton")

import triton.language as tl
from compiler import KERNELS, SHARED_LIMIT, compile_kernel

from mdkv_vllm.kernels.triton import pages
from mdkv_vllm.kernels.triton.codes import field_asm
from mdkv_vllm.kernels.triton.shapes import DecodeShape, ListShape
from mdkv_vllm.testing.leases import EVERY_FORMAT

pytestmark = pytest.mark.slow

DEFAULT = ("i4", "i8", "full")

CAPABILITIES = tuple(SHARED_LIMIT)
PAGES = Path(pages.__file__)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def shape_of(
    names=EVERY_FORMAT, head_size=128, dtype=torch.bfloat16, group=4, prompt_rank=0, max_leases=1
):
    geometry = PageGeometry(16, head_size, dtype)
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, 32, 8, prompt_rank)
    return DecodeShape(layout, group, formats.basis_rank, max_leases)


def check(name, shape, capability):
    compiled = compile_kernel(name, shape, capability)
    assert compiled.local == compiled.stack == 0, f"spills: {compiled}"
    assert compiled.shared <= SHARED_LIMIT[capability]
    return compiled


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16)]
)
def test_every_format(capability, dtype):
    check("attend", shape_of(dtype=dtype), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("head_size", "names"),
    [(64, DEFAULT), (80, DEFAULT), (96, DEFAULT), (256, DEFAULT), (256, ("r16", "i2", "r64"))],
)
def test_head_sizes(capability, head_size, names):
    check("attend", shape_of(names, head_size), capability)


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_leases(capability, head_size):
    check("prepare", shape_of(DEFAULT, head_size, max_leases=128), capability)
    check("attend", shape_of(DEFAULT, head_size, max_leases=128), capability)


@pytest.mark.parametrize("name", KERNELS)
def test_turing_compiles(name):
    """T4: it runs, but not without spills."""
    compile_kernel(name, shape_of(DEFAULT, dtype=torch.float16), 75)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_group_of_more_than_a_tile(capability):
    check("attend", shape_of(DEFAULT, group=17), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "attend"])
@pytest.mark.parametrize(("head_size", "prompt_rank"), [(80, 32), (128, 0), (256, 64)])
def test_rotate_and_merge(name, head_size, prompt_rank, capability):
    names = ("r16", "i4", "full") if not prompt_rank else ("r16", f"r{prompt_rank}", "i4")
    check(name, shape_of(names, head_size, prompt_rank=prompt_rank), capability)


def run_ptx(text, word):
    """Two registers that a field's assembly makes of one."""
    values = {"$2": word}
    for operation in text.strip("{} ").split(";")[1:-1]:
        name, to, *operands = operation.replace(",", " ").split()
        a, *more = (values[x] if x in values else int(x, 0) for x in operands)
        if name == "mov.b32":
            values[to] = a
        elif name == "prmt.b32":
            pool, select = (a | more[0] << 32).to_bytes(8, "little"), more[1]
            chosen = bytes(pool[select >> 4 * i & 7] for i in range(4))
            values[to] = int.from_bytes(chosen, "little")
        else:
            b = more[0]
            done = {"and.b32": a & b, "shr.b32": a >> b, "shl.b32": a << b}
            values[to] = done[name] & 0xFFFFFFFF
    return values["$0"], values["$1"]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_assembly_of_codes(bits):
    """The interpreter runs none, so this does: every byte, between neighbours of every bit."""
    shape = ListShape(parse_format(f"i{bits}", PageGeometry(16, 128, torch.bfloat16)), tl.bfloat16)
    offset = shape.bias - shape.format.zero
    for field in range(8 // bits):
        for byte in range(256):
            packed = bytes((byte, 255 - byte, byte, 255))
            halves = run_ptx(field_asm(bits, field), int.from_bytes(packed, "little"))
            got = torch.tensor(halves, dtype=torch.int64).to(torch.int32).view(torch.float16)
            codes = [x >> field * bits & (1 << bits) - 1 for x in packed]
            assert got.tolist() == [offset + code for code in codes]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("i8", ("packed_values += ",)),
        ("i4", ("packed_values += ",)),
        ("r16", ("keys = tl.load(", "rows = tl.load(")),
        ("full", ("keys = tl.load(", "rows = tl.load(")),
    ],
)
def test_pages_are_read_16_bytes_at_a_time(name, lines, capability):
    """Except K rows of codes that start at odd bytes: those are read in words."""
    compiled = compile_kernel("attend", shape_of((name,)), capability)
    for line in lines:
        assert compiled.load_widths(PAGES, line) == {128}, line
    if name in ("i8", "i4"):
        assert compiled.load_widths(PAGES.with_name("codes.py"), "word = tl.load(") == {32}
