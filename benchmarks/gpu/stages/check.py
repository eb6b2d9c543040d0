"""Stage ``check``: every kernel against float64, what is served by default first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch

from mdkv_vllm.testing.leases import Model, Request

from .. import check as checks
from .. import compress_check, locate
from ..call import kernel_named
from ..device import device
from ..jobs import Ended, Job, Row
from ..loads import Holding, Load
from . import Options, Stage, of_kind
from .build import NAME, build_job

SECONDS = 120
"""Of a check, compiling included."""
SEARCH_SECONDS = 45


class WrongResultError(Exception):
    """A kernel's result is not what it should be."""


def variant(kernel: str, model: Model, mix: Sequence[Request], seed: int) -> Iterator[Row]:
    """Check one variant, a row for each way of calling it.

    Raises:
        WrongResultError: where one is wrong.
    """
    torch.set_num_threads(1)
    yield from _told(checks.check_variant(model, mix, seed, kernel_named(kernel)))


def long_context(kernel: str, load: Load, holding: Holding, seed: int) -> Iterator[Row]:
    """Check inputs as large as those that are timed; see :func:`variant`."""
    yield from _told([checks.check_long(load, holding, seed, kernel_named(kernel))])


def compression(case: compress_check.Case, seed: int) -> Iterator[Row]:
    """Check every part of compressing a prompt, and the whole; see :func:`variant`."""
    torch.set_num_threads(1)
    yield from _told([compress_check.check_compression(case, device().where.type, seed)])


def place(kernel: str, model: Model, name: str, seed: int) -> Iterator[Row]:
    """Say where a format is wrong first."""
    torch.set_num_threads(1)
    found = locate.locate(model, name, seed, kernel_named(kernel))
    yield {"kind": "place", "kernel": kernel, "model": checks.name_of(model), **asdict(found)}


def _told(outcomes: Iterator[checks.Outcome] | Sequence[checks.Outcome]) -> Iterator[Row]:
    wrong = []
    for outcome in outcomes:
        yield {"kind": "check"} | asdict(outcome)
        wrong += [f"{outcome.how}: {failure}" for failure in outcome.failures]
    if wrong:
        raise WrongResultError(wrong[0])


def jobs(options: Options) -> list[Job]:
    """In order of worth: both kernels and compression as served, then all else."""
    models = _rehearsed_models() if options.rehearse else checks.variants()
    cases = _rehearsed_cases() if options.rehearse else compress_check.CASES
    long = () if options.rehearse else checks.LONG
    served = len(checks.SERVED)

    def decode(kernel: str, some: Sequence[Model]) -> list[Job]:
        return [_variant_job(kernel, model, options) for model in some if _takes(kernel, model)]

    compress = [
        Job(case.name, compression, (case, options.seed), seconds=SECONDS) for case in cases
    ]
    contexts = [
        Job(
            f"{kernel} {load.name}, {holding.name}",
            long_context,
            (kernel, load, holding, options.seed),
            SECONDS,
            _needs(kernel),
        )
        for load, holding in long
        for kernel in ("Triton", "CUDA")
    ]
    return [
        build_job(max(1, options.workers // 2)),
        *decode("Triton", models[:served]),
        *compress[:2],
        *decode("CUDA", models[:served]),
        *contexts[:2],
        *decode("Triton", models[served:]),
        *decode("CUDA", models[served:]),
        *compress[2:],
        *contexts[2:],
    ]


def _variant_job(kernel: str, model: Model, options: Options) -> Job:
    mix = _rehearsed_requests(model) if options.rehearse else checks.requests(model)
    name = f"{kernel} {checks.name_of(model)}"
    searches = tuple(
        Job(f"locate {fmt}: {name}", place, (kernel, model, fmt, options.seed), SEARCH_SECONDS)
        for fmt in (*model.names, locate.TAIL)
    )
    arguments = (kernel, model, mix, options.seed)
    return Job(name, variant, arguments, SECONDS, _needs(kernel), on_failure=searches)


def _needs(kernel: str) -> tuple[str, ...]:
    return (NAME,) if kernel == "CUDA" else ()


def _takes(kernel: str, model: Model) -> bool:
    """CUDA refuses float32 caches, see csrc/cuda/tables.cuh."""
    return kernel != "CUDA" or model.dtype != torch.float32


def _rehearsed_models() -> list[Model]:
    small = Model(("i8", "full"), 64, 1, kv_heads=1, block_size=4, query_dtype=torch.bfloat16)
    return [
        small,
        replace(small, names=("r8",), max_leases=2),
        replace(small, dtype=torch.float16, query_dtype=torch.float16),
    ]


def _rehearsed_requests(model: Model) -> list[Request]:
    blocks = model.layout().min_blocks + 1
    several = (blocks, blocks + 1)[: model.max_leases]
    return [Request(blocks, 5), Request(0, 37), Request(several, 1, freed_blocks=0)]


def _rehearsed_cases() -> tuple[compress_check.Case, ...]:
    return (
        compress_check.Case(
            ("drop", "i8", "full"), 64, 1, kv_heads=1, layers=1, tokens=120, budget=0.5
        ),
    )


def report(rows: Sequence[Row], ended: Sequence[Ended]) -> list[str]:
    """What was built, what is wrong and where, and how much was checked."""
    lines = [row["text"] for row in of_kind(rows, "build")]
    found = of_kind(rows, "check")
    lines += [
        f"{row['name']}, {row['how']}: {failure}" for row in found for failure in row["failures"]
    ]
    lines += [f"{row['kernel']} {row['model']}: {row['text']}" for row in of_kind(rows, "place")]
    clean = [row for row in found if not row["failures"]]
    if clean:
        worst = max(clean, key=lambda row: row["error"])
        lines.append(f"largest error of what is right: {worst['error']:.1e} ({worst['name']})")
    done = sum(end.ok for end in ended)
    return [*lines, f"check: {done} of {len(ended)} jobs clean, {len(clean)} of {len(found)} calls"]


STAGE = Stage(235, jobs, report)
