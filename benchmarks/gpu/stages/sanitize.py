"""Stage ``sanitize``: compute-sanitizer's tools side by side, under one limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from .. import sanitize
from ..jobs import Ended, Job, Row
from ..report import OURS
from . import Options, Stage, of_kind
from .build import build_job

SECONDS = 75
"""Of all tools, which start together."""
COMPILING = "compile, without a tool"


class SanitizerError(Exception):
    """A tool found a fault that is there, or missed the planted one."""


def compiled(kernel: str) -> Iterator[Row]:
    """Run the case by itself, so that no tool watches a compiler."""
    sanitize.small_case(kernel, planted=False)
    yield {"kind": "compiled", "name": kernel}


def tool(kernel: str, name: str, planted: bool) -> Iterator[Row]:
    """Run one tool.

    Raises:
        SanitizerError: with what it said.
    """
    found = sanitize.sanitize(kernel, name, planted)
    yield {"kind": "sanitizer", "text": found.text} | asdict(found)
    if found.failed:
        raise SanitizerError(found.message or found.text)


def jobs(options: Options) -> list[Job]:
    """Every tool on both kernels, and memcheck on a planted fault."""
    build = build_job(max(1, options.workers // 2))
    compiling = [
        Job(f"{COMPILING}: {kernel}", compiled, (kernel,), 100, (build.name,)) for kernel in OURS
    ]
    ready = tuple(job.name for job in compiling)
    cases = [("memcheck", True), *((name, False) for name in sanitize.TOOLS)]
    return [
        build,
        *compiling,
        *(
            Job(
                f"{kernel} {name}{', planted fault' if planted else ''}",
                tool,
                (kernel, name, planted),
                SECONDS,
                ready,
            )
            for name, planted in cases
            for kernel in OURS
        ),
    ]


def report(rows: Sequence[Row], _: Sequence[Ended]) -> list[str]:
    """A line for each tool."""
    return [row["text"] for row in of_kind(rows, "sanitizer")]


STAGE = Stage(235, jobs, report)
