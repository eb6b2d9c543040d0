"""What is the C++ decode kernel's own: threads, what it reads and refuses, instruction sets."""

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace

import decode_runners
import pytest
import torch
from decode_runners import Case

from mdkv_vllm.kernels.cpu import cpu_isas
from mdkv_vllm.kernels.cpu.decode import CpuDecode
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig
from mdkv_vllm.testing.leases import EVERY_FORMAT, Model, Request

RUNNER = decode_runners.cpu()


def test_long_request_is_split_over_threads():
    model = Model(names=EVERY_FORMAT, kv_heads=1, layers=2)
    case = Case(RUNNER, model, [Request(300, 300), Request(0, 900), Request(3, 5)])
    rows = [0, 1, 2]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            case.check(rows, case.totals)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (32, 8), (72, 16), (128, 32)])
def test_reads_nothing_past_the_kv_cache(dtype: torch.dtype, head_size: int, block_size: int):
    """Kernels read whole vectors; the page behind the cache here would stop the process."""
    names = ("r4", "r8i4", "i8", "i4", "i2", "full")
    model = Model(names, head_size, dtype=dtype, block_size=block_size)
    blocks = model.layout().min_blocks + 4
    case = Case(RUNNER, model, [Request(blocks, 48), Request(blocks, 3, fill=1.0)])
    size = -(-case.kv_cache.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, size + mmap.PAGESIZE)
    raw = torch.frombuffer(region, dtype=torch.uint8)
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(raw.data_ptr() + size), mmap.PAGESIZE, 0) == 0
    guarded = raw[size - case.kv_cache.nbytes : size].view(dtype).view(case.kv_cache.shape)
    case.kv_cache = guarded.copy_(case.kv_cache)
    for block in case.block_table[case.block_table >= 0].tolist():
        case.swap_blocks(block, case.kv_cache.shape[0] - 1)
        case.check([0, 1], case.totals)
    protect(ctypes.c_void_p(raw.data_ptr() + size), mmap.PAGESIZE, 3)


def decode_one(case: Case, **changes: torch.Tensor) -> None:
    """Attend with one query, with some arguments replaced."""
    model = case.model
    output = torch.full((1, model.kv_heads * model.group, model.head_size), torch.nan)
    batch = DecodeBatch(
        case.block_table,
        torch.zeros(1, dtype=torch.int32),
        torch.tensor(case.totals[:1], dtype=torch.int32),
        case.leases,
    )
    others = {
        "query": torch.ones_like(output),
        "output": output,
        "lse": torch.full(output.shape[:2], torch.nan),
    }
    others |= {name: value for name, value in changes.items() if name in others}
    changed = {name: value for name, value in changes.items() if name not in others}
    config = DecodeConfig(case.kv_cache, case.layout, model.group, case.calibrated, 1.0, 1)
    CpuDecode(config).attend(
        others["query"], 0, replace(batch, **changed), others["output"], others["lse"]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(1, 6, 32)),
        ("query_rows", torch.ones(1, dtype=torch.int32)),
        ("lengths", torch.zeros(1, dtype=torch.int64)),
        ("lengths", torch.full((1,), 10**6, dtype=torch.int32)),
        ("leases", torch.zeros(1, 2, dtype=torch.int32)),
        ("leases", torch.zeros(1, 1, 3, dtype=torch.int32)),
        ("leases", torch.tensor([[[5, 4]]], dtype=torch.int32)),
        ("leases", torch.tensor([[[3, 7], [6, 8]]], dtype=torch.int32)),
        ("leases", torch.tensor([[[-1, 2]]], dtype=torch.int32)),
        ("block_table", torch.full((1, 20), 10**6, dtype=torch.int32)),
        ("block_table", torch.full((1, 20), -1, dtype=torch.int32)),
        ("lse", torch.zeros(6)),
        ("output", torch.zeros(1, 6, 63)),
    ],
)
def test_wrong_arguments_are_named(name: str, value: torch.Tensor | int):
    case = Case(RUNNER, Model(), [Request(4, 5)])
    named = "block_table" if name == "lengths" and value.dtype == torch.int32 else name
    with pytest.raises(RuntimeError, match=named):
        decode_one(case, **{name: value})


def test_corrupt_page_table_is_refused():
    case = Case(RUNNER, Model(), [Request(4, 5)])
    first = case.block_table[0, case.leases[0, 0, 0]].long()
    case.kv_cache[first].view(torch.uint8).view(-1)[:8] = 0x7F
    with pytest.raises(RuntimeError, match="page table of row 0"):
        decode_one(case)


@pytest.mark.skipif("MDKV_CPU_ISA" in os.environ, reason="already one of them")
@pytest.mark.parametrize("isa", [i for i in ("avx2", "portable") if i in cpu_isas()])
@pytest.mark.slow
def test_narrower_instruction_sets(isa: str):
    """The same tests again with the other kernels, which a process chooses once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *_op_tests()],
        env=os.environ | {"MDKV_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def _op_tests() -> list[str]:
    folder = os.path.dirname(__file__)
    names = ("test_cpu_decode.py", "test_cpu_cache.py", "test_cpu_packing.py")
    conformance = os.path.join(folder, "test_decode_conformance.py")
    return [
        *(os.path.join(folder, name) for name in names),
        conformance,
        "-k",
        "not triton and not cuda and not reference",
    ]
