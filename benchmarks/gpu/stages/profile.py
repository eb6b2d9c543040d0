"""Stage ``profile``: Nsight Compute on attending and merging, a page of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .. import ncu
from ..call import Call, kernel_named
from ..device import device
from ..inputs import build
from ..jobs import Ended, Job, Row
from ..loads import FULL, LLAMA, Heads, Holding, Load
from . import Options, Stage, of_kind
from .build import NAME, build_job

LOAD = Load(LLAMA, 8, 8192)
ALONE = Load(LLAMA, 1, 32768)
"""A batch of one, where merging many parts is a share of the time."""
TINY = Load(Heads("tiny", 1, 1, 64), 1, 150)
I4 = Holding("int", 0.25)
KERNELS = "attend|merge"
SECONDS = 60
WARM_UP = 2
"""Calls before the one that is profiled; each launches both kernels once."""


def call(kernel: str, load: Load, holding: Holding) -> None:
    """What runs under the profiler."""
    generator = torch.Generator(device().where).manual_seed(0)
    inputs = build(load, holding, 1, device().where, generator)
    made = Call(inputs, kernel_named(kernel))
    for _ in range(WARM_UP + 1):
        made.step(0)
        device().synchronize()


def profiled(kernel: str, load: Load, holding: Holding) -> Iterator[Row]:
    """Profile one call of a kernel; a row for each of its launches."""
    statement = (
        "import torch; from benchmarks.gpu.loads import *; "
        "from benchmarks.gpu.stages.profile import call; "
        f"call({kernel!r}, {load!r}, {holding!r})"
    )
    generator = torch.Generator(device().where).manual_seed(0)
    pages = build(load, holding, 1, device().where, generator).pages
    for launch in ncu.profile(statement, KERNELS, 2 * WARM_UP, 2):
        title = f"{kernel}, {load.name}, {holding.name}"
        read = pages if "attend" in str(launch["name"]) else 0
        lines = ncu.in_words(title, launch, read)
        yield {"kind": "profile", "title": title, "pages": read, "lines": lines} | launch


def jobs(options: Options) -> list[Job]:
    """Codes against full vectors for both kernels, then a batch of one."""
    cases = [(LOAD, I4), (LOAD, FULL), (ALONE, Holding("mixed", 0.25))]
    if options.rehearse:
        cases = [(TINY, Holding("int", 0.5))]
    return [
        build_job(max(1, options.workers // 2)),
        *(
            Job(
                f"profile {kernel}, {load.name}, {holding.name}",
                profiled,
                (kernel, load, holding),
                SECONDS,
                (NAME,),
                alone=True,
            )
            for load, holding in cases
            for kernel in ("CUDA", "Triton")
        ),
    ]


def report(rows: Sequence[Row], _: Sequence[Ended]) -> list[str]:
    """All of it: that is a page."""
    return [line for row in of_kind(rows, "profile") for line in row["lines"]]


STAGE = Stage(235, jobs, report)
