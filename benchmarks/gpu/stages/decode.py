"""Stage ``decode``: the table that decides, and the price of many layers in a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..baselines import BASELINES, VLLM_KERNELS
from ..jobs import Ended, Job, Row
from ..loads import (
    BATCHES,
    DECISIVE,
    DECISIVE_HOLDINGS,
    EVERY_LOAD,
    FULL,
    HOLDINGS,
    MANY_LAYERS,
    SEGMENTS,
    SEGMENTS_FROM,
    Heads,
    Holding,
    Load,
)
from ..measure import compile_kernels, time_full_caches, time_ours
from ..report import OURS, Timed, aims, comparison, in_segments, table, translation
from . import Options, Stage, of_kind
from .build import build_job

SECONDS = 30
"""Of a timing job."""
COMPILING = 100


def jobs(options: Options) -> list[Job]:
    """Compile everything first, side by side; then time, one job at a time."""
    segments, long = SEGMENTS, SEGMENTS_FROM
    if options.rehearse:
        segments, long = Holding("mixed", 0.5, 64), 0
        tiny = Load(Heads("tiny", 1, 1, 64), 2, 150)
        loads, holdings = (tiny,), (FULL, Holding("mixed", 0.5))
        many: tuple[tuple[Load, Holding], ...] = ((replace(tiny, layers=3), FULL),)
    elif options.everything:
        loads, holdings, many = EVERY_LOAD, HOLDINGS, MANY_LAYERS
    else:
        loads = options.loads or DECISIVE
        holdings, many = DECISIVE_HOLDINGS, () if options.loads else MANY_LAYERS
    baselines = tuple(BASELINES) if options.everything else (*VLLM_KERNELS, "torch cuDNN")
    held = {load: (*holdings, *[segments] * (load.tokens >= long)) for load in loads}
    pairs = [(load, holding) for load, some in held.items() for holding in some]
    compiling = _compile_jobs([*pairs, *many], options)
    ready = tuple(job.name for job in compiling)
    timing = [job for load in loads for job in _timing_jobs(load, held[load], baselines, options)]
    for load, holding in many:
        for layers in (load.layers, 1):
            one = replace(load, layers=layers)
            timing += [_our_job(one, (holding,), kernel, options) for kernel in OURS]
    return [*compiling, *(replace(job, after=ready, alone=True) for job in timing)]


def _compile_jobs(pairs: Sequence[tuple[Load, Holding]], options: Options) -> list[Job]:
    kinds = {
        (
            load.heads, load.layers, holding.formats(load.heads.head_size),
            holding.max_leases(load.tokens),
        ): (load, holding)
        for load, holding in pairs
    }  # fmt: skip
    batches = sorted({load.batch for load, _ in pairs} | set(BATCHES if options.everything else ()))
    return [
        build_job(max(1, options.workers // 2)),
        *(
            Job(
                f"compile {load.name}, {holding.name}",
                compile_kernels,
                (load, holding, batches, options.seed),
                COMPILING,
            )
            for load, holding in kinds.values()
        ),
    ]


def _timing_jobs(
    load: Load, holdings: Sequence[Holding], baselines: Sequence[str], options: Options
) -> list[Job]:
    arguments = (load, baselines, options.seed)
    return [
        Job(f"full caches, {load.name}", time_full_caches, arguments, SECONDS),
        *(_our_job(load, holdings, kernel, options) for kernel in OURS),
    ]


def _our_job(load: Load, holdings: Sequence[Holding], kernel: str, options: Options) -> Job:
    names = ", ".join(holding.name for holding in holdings)
    arguments = (load, holdings, kernel, options.seed)
    return Job(f"{kernel}, {load.name}, {names}", time_ours, arguments, SECONDS)


def report(rows: Sequence[Row], _: Sequence[Ended]) -> list[str]:
    """A table per kernel, the copy's rate, many layers, both kernels compared, and the aims."""
    timed = [Timed.of(row) for row in of_kind(rows, "timing")]
    lines = [row["text"] for row in of_kind(rows, "build")]
    for kernel in OURS:
        if any(row.kernel == kernel for row in timed):
            lines += ["", f"{kernel}: time over the best full cache's, share of the copy's rate"]
            lines += table(timed, ("full", "mixed", "segments"), kernel).splitlines()
            if any(row.holding.split()[0] in ("int", "rank") for row in timed):
                lines += ["", *table(timed, ("int", "rank"), kernel).splitlines()]
    rates = [row.copy_rate for row in timed]
    lines += ["", *translation(timed), *in_segments(timed)]
    if rates:
        lines.append(
            f"copy: {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GB/s, read plus written"
        )
    return [*lines, comparison(timed), *(aim.line for aim in aims(timed))]


STAGE = Stage(235, jobs, report)
