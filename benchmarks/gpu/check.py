"""Variants of the decode kernels on fresh random leases, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES
from mdkv_vllm.testing import leases
from mdkv_vllm.testing.leases import EVERY_FORMAT, Model, Request

from .call import Call, Kernel
from .device import device, no_synchronisation
from .inputs import build
from .loads import FULL, MODELS, SEGMENTS, Holding, Load
from .reference import mixed_decode as float64_decode
from .trial import NO_ROW, TOLERANCE, Errors, Trial, worst

DEFAULT = ("i4", "i8", "full")
GROUPS = (1, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)
SERVED = tuple(Model(DEFAULT, size, 4, query_dtype=torch.bfloat16) for size in (128, 64))
"""What servers run unless told otherwise."""


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        name: what was checked.
        error: largest relative error of an output vector.
        lse_error: largest absolute error of a log-sum-exp.
        failures: what went wrong; empty where all is well.
        how: the way in which kernels were called.
    """

    name: str
    error: float
    lse_error: float
    failures: tuple[str, ...]
    how: str = "called"


def variants() -> list[Model]:
    """Models for which kernels are compiled and checked, those that are served by default first.

    Every head size with every type and 1 to 5 leases, every group with both types; then up to 9
    leases of what is served and more than a warp has threads, other ranks, a prompt's own basis,
    other block sizes, a float32 cache, and a group of more than a tile.
    """
    sixteen_bit = [
        Model(
            EVERY_FORMAT, size, GROUPS[(i + j) % 4], dtype=dtype, query_dtype=dtype,
            max_leases=1 + (i + 2 * j) % 5,
        )
        for i, size in enumerate(GPU_HEAD_SIZES)
        for j, dtype in enumerate(DTYPES)
    ]  # fmt: skip
    plain = SERVED[0]
    basis = Model(("r8", "r24", "r16i4", "full"), prompt_basis_rank=24, query_dtype=torch.bfloat16)
    return [
        *SERVED,
        *(replace(plain, max_leases=leases) for leases in (3, 9)),
        *sixteen_bit,
        replace(plain, names=("i4", "full"), head_size=64, max_leases=40),
        *(replace(plain, group=group) for group in GROUPS if group != plain.group),
        replace(plain, names=("r8", "r16", "r32", "r64"), group=8),
        replace(plain, names=("r4", "r4i2", "r8i4"), head_size=64),
        replace(plain, names=("full",), head_size=64, group=17),
        basis,
        replace(basis, block_size=8, dtype=torch.float16, query_dtype=torch.float16),
        replace(plain, block_size=48, group=3),
        replace(plain, names=EVERY_FORMAT, dtype=torch.float32, query_dtype=torch.float32),
    ]


def requests(model: Model) -> list[Request]:
    """Ragged requests: several leases, one or none, empty lists, one-token tails, and long ones.

    Of the long ones many programs share the pages.
    """
    blocks = model.layout().min_blocks + 2
    long = (*range(blocks + 20, blocks + 20 - model.max_leases, -1),)
    return [
        *leases.ragged(model),
        Request(blocks, 1, fill=0.0),
        Request(blocks + 60, 333),
        Request(long[: min(model.max_leases, 9)], 150, 1),
        Request(0, 2000),
    ]


def name_of(model: Model) -> str:
    """A variant in words."""
    dtype = str(model.dtype).removeprefix("torch.")
    name = f"{model.head_size} x {model.group} {dtype} {'/'.join(model.names)}"
    if model.prompt_basis_rank:
        name += f" basis {model.prompt_basis_rank}"
    if model.max_leases > 1:
        name += f" {model.max_leases} leases"
    return name if model.block_size == 16 else f"{name} block {model.block_size}"


def check_variant(
    model: Model, mix: Sequence[Request], seed: int, kernel: Kernel
) -> Iterator[Outcome]:
    """Check one variant: called directly and, where that can be, in a CUDA graph."""
    case = leases.Case(model, list(mix), seed)
    rows = [*range(len(mix)), 1, 1, NO_ROW]
    # Several queries of a row, of different lengths, and padding.
    lengths = [*case.totals, case.totals[1] - 33, 1, 0]
    trial = Trial(case, len(rows), device().where, kernel)
    trial.load(rows, lengths)
    trial.launch()
    name = f"{kernel.name} {name_of(model)}"
    yield _outcome(name, "called", trial.errors())
    if device().captures:
        for how, errors in _captured(trial, rows, lengths):
            yield _outcome(name, how, errors)


def _outcome(name: str, how: str, errors: Errors) -> Outcome:
    return Outcome(name, errors.output, errors.lse, errors.wrong, how)


def _captured(
    trial: Trial, rows: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[str, Errors]]:
    """Call under torch's synchronisation check, then capture, and replay with other metadata."""
    trial.load(rows, lengths)
    with no_synchronisation():
        trial.launch()
    yield "without synchronisation", trial.errors()
    replay = device().captured(trial.launch)
    trial.load(rows, lengths)
    replay()
    yield "replayed", trial.errors()
    # Other rows, lengths, queries and blocks in the same buffers, among them a row twice.
    blocks = torch.randperm(len(trial.case.kv_cache)).tolist()
    for a, b in zip(blocks[::2], blocks[1::2], strict=False):
        trial.case.swap_blocks(a, b)
    shorter = [max(1, n - 5) if row in (1, 4) else n for row, n in zip(rows, lengths, strict=True)]
    trial.load([*rows[::-1][1:], 2], [*shorter[::-1][1:], trial.case.totals[2]])
    replay()
    yield "replayed with other metadata", trial.errors()


LONG = (
    (Load(MODELS[0], 8, 32768), Holding("mixed", 0.25)),
    (Load(MODELS[0], 2, 131072), FULL),
    (Load(MODELS[0], 4, 32768), SEGMENTS),
    (Load(MODELS[1], 1, 131072), Holding("mixed", 0.125)),
    (Load(MODELS[2], 64, 4096), Holding("int", 0.5)),
    (Load(MODELS[0], 256, 4096), Holding("rank", 0.125)),
)
"""Contexts as long, and batches as large, as those that are timed."""
LONG_SETS_BYTES = 5 << 30
"""Cache of a long context, so that addresses need more than 32 bits."""


def check_long(load: Load, holding: Holding, seed: int, kernel: Kernel) -> Outcome:
    """Check the inputs that are timed, in a cache larger than the requests, at its end."""
    where = device().where
    generator = torch.Generator(where).manual_seed(seed)
    sets = 1
    if where.type == "cuda":
        sets += int(LONG_SETS_BYTES // (load.full_bytes * holding.budget))
    inputs = build(load, holding, sets, where, generator)
    call = Call(inputs, kernel)
    call.poison()
    last = call.steps - 1
    call.step(last)
    of, layer = divmod(last, load.layers)
    expected, _ = float64_decode(
        inputs.queries[of],
        inputs.kv_cache,
        layer,
        inputs.layout,
        inputs.block_table,
        inputs.query_rows[of],
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
