"""Every variant of the kernel on fresh random leases, against float64."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace

import leases
import torch
from leases import Model, Request

from .call import CUDA, TRITON, Call, Kernel, kernels
from .inputs import build
from .loads import FULL, MODELS, Holding, Load
from .reference import mixed_decode as float64_decode
from .trial import NO_ROW, TOLERANCE, Errors, Trial, worst

EVERY_FORMAT = ("r16", "r32i8", "i8", "i4", "i2", "full")
DEFAULT = ("i4", "i8", "full")
HEAD_SIZES = (64, 80, 96, 128, 256)
GROUPS = (1, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Outcome:
    """One variant's result, or a long context's.

    Attributes:
        name: what was checked.
        error: largest relative error of an output vector, over every call.
        lse_error: largest absolute error of a log-sum-exp.
        failures: what went wrong; empty where all is well.
    """

    name: str
    error: float
    lse_error: float
    failures: tuple[str, ...]


def variants(quick: bool) -> list[Model]:
    """Models for which kernels are compiled and checked.

    Every head size with every type, every group with both; then other ranks, a prompt's own
    basis, other block sizes, a float32 cache, and a group of more than a tile.
    """
    sixteen_bit = [
        Model(EVERY_FORMAT, size, GROUPS[(i + j) % 4], dtype=dtype, query_dtype=dtype)
        for i, size in enumerate(HEAD_SIZES)
        for j, dtype in enumerate(DTYPES)
    ]
    if quick:
        return sixteen_bit[::3]
    plain = Model(DEFAULT, 128, 4, query_dtype=torch.bfloat16)
    basis = Model(("r8", "r24", "r16i4", "full"), prompt_basis_rank=24, query_dtype=torch.bfloat16)
    return [
        *sixteen_bit,
        *(replace(plain, group=group) for group in GROUPS),
        replace(plain, names=("r8", "r16", "r32", "r64"), group=8),
        replace(plain, names=("r4", "r4i2", "r8i4"), head_size=64),
        replace(plain, names=("full",), head_size=64, group=17),
        basis,
        replace(basis, block_size=8, dtype=torch.float16, query_dtype=torch.float16),
        replace(plain, block_size=48, group=3),
        replace(plain, names=EVERY_FORMAT, dtype=torch.float32, query_dtype=torch.float32),
    ]


def requests(model: Model) -> list[Request]:
    """Ragged requests: leases, empty lists, one-token tails, no lease, and long ones.

    Of the long ones many programs share the pages.
    """
    blocks = model.layout().min_blocks + 2
    return [
        *leases.ragged(blocks),
        Request(blocks, 1, fill=0.0),
        Request(blocks + 60, 333),
        Request(0, 2000),
    ]


def name_of(model: Model) -> str:
    """A variant in words."""
    dtype = str(model.dtype).removeprefix("torch.")
    name = f"{model.head_size} x {model.group} {dtype} {'/'.join(model.names)}"
    if model.prompt_basis_rank:
        name += f" basis {model.prompt_basis_rank}"
    return name if model.block_size == 16 else f"{name} block {model.block_size}"


def check_variant(
    model: Model,
    mix: Sequence[Request],
    device: str,
    seed: int,
    kernel: Kernel = TRITON,
) -> Outcome:
    """Check one variant: called directly and, on a GPU, synchronisation-free and in a graph."""
    case = leases.Case(model, list(mix), seed)
    rows = [*range(len(mix)), 1, 1, NO_ROW]
    # Several queries of a row, of different lengths, and padding.
    lengths = [*case.totals, case.totals[1] - 33, 1, 0]
    trial = Trial(case, len(rows), torch.device(device), kernel)
    trial.load(rows, lengths)
    trial.launch()
    found = [("called", trial.errors())]
    if trial.device.type == "cuda":
        found += _captured(trial, rows, lengths)
    failures = [f"{how}: {wrong}" for how, errors in found for wrong in errors.wrong]
    worst_errors = [(errors.output, errors.lse) for _, errors in found]
    output, lse = (max(side) for side in zip(*worst_errors, strict=True))
    return Outcome(f"{kernel.name} {name_of(model)}", output, lse, tuple(failures))


def _captured(
    trial: Trial, rows: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[str, Errors]]:
    """Call under torch's synchronisation check, then capture, and replay with other metadata."""
    trial.load(rows, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trial.launch()
        try:
            trial.lengths[0].item()
        except RuntimeError:
            pass
        else:
            raise AssertionError("the synchronisation check finds none")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield "without synchronisation", trial.errors()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trial.launch()
    trial.load(rows, lengths)
    graph.replay()
    yield "replayed", trial.errors()
    # Other rows, lengths, queries and blocks in the same buffers, among them a row twice.
    blocks = torch.randperm(len(trial.case.arena)).tolist()
    for a, b in zip(blocks[::2], blocks[1::2], strict=False):
        trial.case.swap_blocks(a, b)
    shorter = [max(1, n - 5) if row in (1, 4) else n for row, n in zip(rows, lengths, strict=True)]
    trial.load([*rows[::-1][1:], 2], [*shorter[::-1][1:], trial.case.totals[2]])
    graph.replay()
    yield "replayed with other metadata", trial.errors()


LONG = (
    (Load(MODELS[0], 2, 131072), FULL),
    (Load(MODELS[0], 8, 32768), Holding("mixed", 0.25)),
    (Load(MODELS[1], 1, 131072), Holding("mixed", 0.125)),
    (Load(MODELS[2], 64, 4096), Holding("int", 0.5)),
    (Load(MODELS[0], 256, 4096), Holding("rank", 0.125)),
)
"""Contexts as long, and batches as large, as those that are timed."""
LONG_SETS_BYTES = 5 << 30
"""Cache of a long context, so that addresses need more than 32 bits."""


def check_long(
    load: Load, holding: Holding, device: str, seed: int, kernel: Kernel = TRITON
) -> Outcome:
    """Check the inputs that are timed, in a cache larger than the requests, at its end."""
    where = torch.device(device)
    generator = torch.Generator(where).manual_seed(seed)
    sets = 1
    if where.type == "cuda":
        sets += int(LONG_SETS_BYTES // (load.full_bytes * holding.budget))
    inputs = build(load, holding, sets, where, generator)
    call = Call(inputs, where, kernel)
    call.poison()
    last = inputs.sets - 1
    call.step(last)
    expected, _ = float64_decode(
        inputs.queries[last],
        inputs.arena,
        0,
        inputs.layout,
        inputs.block_table,
        inputs.query_rows[last],
        inputs.lengths,
        inputs.leases,
        inputs.basis,
        call.scale,
    )
    distance = (call.output.double() - expected).norm(dim=-1)
    error = worst(distance / expected.norm(dim=-1))
    limit = TOLERANCE[load.heads.dtype]
    wrong = () if error <= limit else (f"relative error {error:.1e}, over {limit:.0e}",)
    return Outcome(f"{kernel.name} {load.name}, {holding.name}", error, 0.0, wrong)


def check_all(quick: bool, seed: int, workers: int) -> Iterator[Outcome]:
    """Check everything on the GPU, several variants at once, since compiling takes longest.

    Every check has a process of its own: one that breaks its CUDA context breaks no other.
    """
    context = multiprocessing.get_context("spawn")
    # One thread each: there are as many processes as there is work for.
    with ProcessPoolExecutor(
        workers, context, torch.set_num_threads, (1,), max_tasks_per_child=1
    ) as pool:
        jobs: dict[str, Future[Outcome]] = {}
        for kernel in kernels():
            for number, model in enumerate(variants(quick)):
                if kernel is CUDA and model.dtype == torch.float32:
                    continue  # refused, see csrc/cuda/tables.cuh
                jobs[f"{kernel.name} {name_of(model)}"] = pool.submit(
                    check_variant, model, requests(model), "cuda", seed + number, kernel
                )
            for number, (load, holding) in enumerate(LONG[1:3] if quick else LONG):
                jobs[f"{kernel.name} {load.name}, {holding.name}"] = pool.submit(
                    check_long, load, holding, "cuda", seed + number, kernel
                )
        for name, job in jobs.items():
            try:
                yield job.result()
            except Exception as error:  # whatever a kernel does must end in the report
                yield Outcome(name, math.nan, math.nan, (f"{type(error).__name__}: {error}",))
