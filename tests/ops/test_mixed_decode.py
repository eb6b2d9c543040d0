"""The decode kernel against the float64 reference, on random ragged leases."""

import ctypes
import mmap
import os
import subprocess
import sys

import leases
import pytest
import torch
from leases import Model, Request, ragged

from mdkv_vllm.ops import cpu

TOLERANCE = {torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error by output type. Codes may be scored and summed with 15-bit weights."""


class Case(leases.Case):
    """Runs the CPU kernel."""

    def decode(self, query, layer, query_rows, lengths, scale, output, lse):
        tables = cpu.DecodeTables.build(self.layout, self.calibrated)
        requests = (self.block_table, query_rows, lengths, self.leases)
        cpu.mixed_decode(query, self.arena, layer, tables, *requests, scale, output, lse)

    def tolerance(self):
        return TOLERANCE[self.model.query_dtype]


def run_ragged(model: Model, seed: int = 0) -> None:
    layout = model.layout()
    case = Case(model, ragged(layout.min_blocks + 5), seed)
    rows = [0, 1, 2, 3, 4, 0, 1, 1]
    totals = [case.totals[row] for row in rows]
    totals[5] -= 5  # several queries of a row, of different lengths
    totals[6] -= 33
    totals[7] = 1
    case.check(rows, totals)


EVERY_FORMAT = ("r16", "r32i8", "i8", "i4", "i2", "full")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_single_format(name: str, dtype: torch.dtype):
    run_ragged(Model(names=(name,), dtype=dtype))


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_head_sizes_and_groups(head_size: int, group: int):
    names = ("r16", "i8", "i4", "i2", "full") + (("r32i8",) if head_size > 32 else ())
    run_ragged(Model(names=names, head_size=head_size, group=group), seed=head_size + group)


@pytest.mark.parametrize("group", [2, 5, 7, 16, 17])
def test_odd_groups(group: int):
    run_ragged(Model(names=EVERY_FORMAT, group=group, kv_heads=1))


@pytest.mark.parametrize("head_size", [8, 40, 72, 512])
def test_unusual_head_sizes(head_size: int):
    names = ("r4", "i8", "i4", "i2", "full")
    run_ragged(Model(names=names, head_size=head_size, kv_heads=1), seed=head_size)


@pytest.mark.parametrize("block_size", [8, 32, 48, 128])
def test_block_sizes(block_size: int):
    run_ragged(Model(names=EVERY_FORMAT, block_size=block_size))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, query_dtype: torch.dtype):
    run_ragged(Model(names=EVERY_FORMAT, dtype=dtype, query_dtype=query_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_basis(dtype: torch.dtype):
    names = ("r8", "r24", "r16i4", "full")
    run_ragged(Model(names=names, dtype=dtype, prompt_basis_rank=24, block_size=8))


@pytest.mark.parametrize("names", [("r4", "r4i2", "r8i4"), ("r60", "r12i8"), ("r32", "r48i2")])
def test_ranks(names: tuple[str, ...]):
    run_ragged(Model(names=names, group=4))


def test_empty_lists():
    case = Case(Model(), [Request(4, 1, fill=0.0), Request(4, 20, fill=0.0)])
    case.check([0, 1], case.totals)


def test_lease_without_tail():
    case = Case(Model(), [Request(6, 0)])
    case.check([0], case.totals)


def test_no_lease_at_all():
    case = Case(Model(names=("full",)), [Request(0, n) for n in (1, 15, 16, 17, 300)])
    case.check([0, 1, 2, 3, 4], case.totals)


def test_long_request_is_split_over_threads():
    model = Model(names=EVERY_FORMAT, kv_heads=1, layers=2)
    case = Case(model, [Request(300, 300), Request(0, 900), Request(3, 5)])
    rows = [0, 1, 2]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            case.check(rows, case.totals)
    finally:
        torch.set_num_threads(threads)


def test_large_scores_do_not_overflow():
    case = Case(Model(query_dtype=torch.float32), [Request(8, 50)])
    case.arena[case.block_table[0, -1].long(), :, :2] *= 60
    case.check([0], case.totals)


def test_nan_is_not_hidden():
    case = Case(Model(), [Request(0, 50)])
    case.arena[case.block_table[0, 0].long(), 0, 3] = torch.nan
    output = decode_one(case)
    assert output[:, : case.model.group].isnan().all()
    assert not output[:, case.model.group :].isnan().any()


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (32, 8), (72, 16), (128, 32)])
def test_reads_nothing_past_the_arena(dtype: torch.dtype, head_size: int, block_size: int):
    """Kernels read whole vectors; the page behind the arena here would stop the process."""
    names = ("r4", "r8i4", "i8", "i4", "i2", "full")
    model = Model(names, head_size, dtype=dtype, block_size=block_size)
    blocks = model.layout().min_blocks + 4
    case = Case(model, [Request(blocks, 48), Request(blocks, 3, fill=1.0)])
    size = -(-case.arena.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, size + mmap.PAGESIZE)
    raw = torch.frombuffer(region, dtype=torch.uint8)
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(raw.data_ptr() + size), mmap.PAGESIZE, 0) == 0
    guarded = raw[size - case.arena.nbytes : size].view(dtype).view(case.arena.shape)
    case.arena = guarded.copy_(case.arena)
    for block in case.block_table[case.block_table >= 0].tolist():
        case.swap_blocks(block, case.arena.shape[0] - 1)
        case.check([0, 1], case.totals)
    protect(ctypes.c_void_p(raw.data_ptr() + size), mmap.PAGESIZE, 3)


def decode_one(case: Case, **changes: torch.Tensor | int | float) -> torch.Tensor:
    """Call the operator for one query, with some arguments replaced."""
    model = case.model
    output = torch.full((1, model.kv_heads * model.group, model.head_size), torch.nan)
    arguments = {
        "query": torch.ones_like(output),
        "arena": case.arena,
        "layer": 0,
        "tables": cpu.DecodeTables.build(case.layout, case.basis),
        "block_table": case.block_table,
        "query_rows": torch.zeros(1, dtype=torch.int32),
        "lengths": torch.tensor(case.totals[:1], dtype=torch.int32),
        "leases": case.leases,
        "scale": 1.0,
        "output": output,
        "lse": torch.full(output.shape[:2], torch.nan),
    } | changes
    cpu.mixed_decode(**arguments)
    if arguments["lengths"][0] == 0:
        assert (arguments["lse"] == -torch.inf).all()
    return arguments["output"]


def test_length_zero_gives_zeros():
    case = Case(Model(), [Request(4, 5)])
    output = decode_one(case, lengths=torch.zeros(1, dtype=torch.int32))
    assert (output == 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(1, 6, 32)),
        ("query_rows", torch.ones(1, dtype=torch.int32)),
        ("lengths", torch.zeros(1, dtype=torch.int64)),
        ("lengths", torch.full((1,), 10**6, dtype=torch.int32)),
        ("leases", torch.zeros(1, 3, dtype=torch.int32)),
        ("leases", torch.tensor([[5, 4]], dtype=torch.int32)),
        ("block_table", torch.full((1, 20), 10**6, dtype=torch.int32)),
        ("block_table", torch.full((1, 20), -1, dtype=torch.int32)),
        ("lse", torch.zeros(6)),
        ("output", torch.zeros(1, 6, 63)),
    ],
)
def test_wrong_arguments_are_named(name: str, value: torch.Tensor | int):
    case = Case(Model(), [Request(4, 5)])
    named = "block_table" if name == "lengths" and value.dtype == torch.int32 else name
    with pytest.raises(RuntimeError, match=named):
        decode_one(case, **{name: value})


def test_corrupt_page_table_is_refused():
    case = Case(Model(), [Request(4, 5)])
    first = case.block_table[0, case.leases[0, 0]].long()
    case.arena[first].view(torch.uint8).view(-1)[:8] = 0x7F
    with pytest.raises(RuntimeError, match="page table of row 0"):
        decode_one(case)


@pytest.mark.skipif("MDKV_CPU_ISA" in os.environ, reason="already one of them")
@pytest.mark.parametrize("isa", [i for i in ("avx2", "portable") if i in cpu.cpu_isas()])
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
    names = ("test_mixed_decode.py", "test_store_load.py", "test_pack_pages.py")
    return [os.path.join(folder, name) for name in names]
