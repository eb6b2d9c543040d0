"""Leases read back, by every implementation, against the float64 specification."""

from concurrent.futures import ProcessPoolExecutor

import interpreter
import pytest
import torch

from mdkv_vllm.core.reference import leases_of, read_lease
from mdkv_vllm.kernels.interface import ReadConfig, Sources
from mdkv_vllm.kernels.registry import READERS
from mdkv_vllm.testing.leases import EVERY_FORMAT, Case, Model, Request

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDED = {FP32: 3e-6, FP16: 1.2e-3, BF16: 8e-3}


def read(name, config, layer, sources, targets, keys, values):
    """Read; keys and values."""
    READERS[name](config).read(layer, sources, targets, keys, values)
    return keys, values


@pytest.fixture(scope="module")
def processes():
    """Where each implementation runs; here where there is none."""
    pytest.importorskip("triton")
    with interpreter.start() as running:
        yield {"cpu": None, "triton": running}


def full(
    case: Case, row: int, tail: int, head: int, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's full tokens, from a block on."""
    size = case.model.block_size
    at = torch.arange(tail * size, case.totals[row])
    place = layer * case.model.kv_heads + head
    slots = case.kv_cache[case.block_table[row].long()[at // size], place, at % size].double()
    return slots.split(case.model.head_size, -1)


def check(process: ProcessPoolExecutor | None, name: str, case: Case, layer: int = 1) -> None:
    """Every lease and every tail, in any order, with room between that stays as it is."""
    fields, targets, wanted, at = [], [], [], 2
    for row, blocks in enumerate(case.block_table):
        for head in range(case.model.kv_heads):
            end = 0
            for first, end in leases_of(case.leases, row):
                fields.append((row, head, first, end, 0))
                wanted.append(
                    read_lease(
                        case.kv_cache, blocks[first:end], layer, head, case.layout, case.calibrated
                    )
                )
                targets.append(at)
                at += len(wanted[-1][0]) + 3
            tokens = case.totals[row] - end * case.model.block_size
            if tokens:
                last = end + -(-tokens // case.model.block_size)
                fields.append((row, head, end, last, tokens))
                wanted.append(full(case, row, end, head, layer))
                targets.append(at)
                at += tokens
    order = torch.randperm(len(fields), generator=case.gen)
    sources = Sources(
        case.block_table,
        torch.tensor(fields, dtype=torch.int32)[order].contiguous(),
        max(field[3] - field[2] for field in fields),
    )
    dtype = case.model.query_dtype
    keys, values = torch.full((2, at, case.model.head_size), 7.0, dtype=dtype)
    config = ReadConfig(case.kv_cache, case.layout, case.calibrated)
    arguments = (name, config, layer, sources, torch.tensor(targets, dtype=torch.int32)[order])
    run = read if process is None else lambda *all_: process.submit(read, *all_).result()
    found = run(*arguments, keys, values)
    between = torch.ones(at, dtype=torch.bool)
    cache_error = 0 if name == "cpu" else ROUNDED[case.model.dtype]
    tolerance = max(ROUNDED[dtype], cache_error)
    for target, sides in zip(targets, wanted, strict=True):
        rows = slice(target, target + len(sides[0]))
        between[rows] = False
        for got, exact in zip(found, sides, strict=True):
            error = (got[rows].double() - exact).norm(dim=-1)
            assert (error <= tolerance * exact.norm(dim=-1) + 1e-6).all(), error.max()
    for got in found:
        assert (got[between] == 7.0).all(), "written where nothing goes"


REQUESTS = [
    Request(40, 37),
    Request(0, 20),
    Request((5, 9), 16, fill=(0.0, 0.9)),
    Request(9, 0, fill=0.5),
]
LEASES = 2
"""Of a request at most."""


@pytest.mark.parametrize("name", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_format(processes, name, dtype, rank):
    query_dtype = dtype if name == "triton" else FP32
    model = Model(
        EVERY_FORMAT, dtype=dtype, query_dtype=query_dtype, prompt_basis_rank=rank,
        max_leases=LEASES,
    )  # fmt: skip
    check(processes[name], name, Case(model, REQUESTS))


@pytest.mark.parametrize("name", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("output", [BF16, FP16])
def test_types_of_the_model(processes, name, output):
    model = Model(EVERY_FORMAT, kv_heads=1, dtype=FP32, query_dtype=output, max_leases=LEASES)
    check(processes[name], name, Case(model, REQUESTS))


@pytest.mark.parametrize(
    ("name", "head_size"),
    [
        *(("cpu", size) for size in (8, 40, 80, 96, 128, 256)),
        *(pytest.param("triton", size, marks=pytest.mark.slow) for size in (80, 128, 256)),
    ],
)
def test_head_sizes(processes, name, head_size):
    names = EVERY_FORMAT if head_size > 40 else ("r4", "i8", "i4", "i2", "full")
    model = Model(names, head_size, kv_heads=1, query_dtype=BF16)
    check(processes[name], name, Case(model, REQUESTS[:2]))


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_block_sizes(processes, block_size):
    check(
        None, "cpu", Case(Model(EVERY_FORMAT, block_size=block_size, max_leases=LEASES), REQUESTS)
    )


def test_any_number_of_threads():
    case = Case(Model(EVERY_FORMAT, max_leases=LEASES), REQUESTS)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(None, "cpu", case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        ((9, 0, 3, 43, 0), 0, "row 9 of 4"),
        ((0, 2, 3, 43, 0), 0, "head 2 of 2"),
        ((0, 0, 3, 900, 0), 0, "blocks 3 to 900"),
        ((0, 0, 2, 43, 0), 0, "names block -1"),
        ((1, 0, 0, 1, 20), 0, "20 tokens in blocks 0 to 1"),
        ((1, 0, 0, 2, 20), 1, "20 tokens from row 1 of 20"),
    ],
)
def test_what_lies_outside_is_refused(fields, target, message):
    case = Case(Model(max_leases=LEASES), REQUESTS)
    sources = Sources(case.block_table, torch.tensor([fields], dtype=torch.int32), 40)
    config = ReadConfig(case.kv_cache, case.layout, case.calibrated)
    keys, values = torch.empty(2, 20, 64)
    with pytest.raises(RuntimeError, match=message):
        read("cpu", config, 0, sources, torch.tensor([target], dtype=torch.int32), keys, values)
