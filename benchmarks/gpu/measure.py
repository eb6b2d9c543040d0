"""Times every load: kernels for a full cache first, then ours with less and less of it."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from .call import Call, kernels
from .inputs import build
from .loads import Holding, Load
from .report import Row
from .rivals import MAX_ERROR, RIVALS, FullCache, Step
from .timing import DeviceCopy, Timing, compile_calls, free_memory, sets_for, time_calls

MEMORY_SHARE = 0.8
"""Of what is free, for one cache."""

NOT_TIMED = Timing(math.nan, math.nan, False)


def compile_all(loads: Sequence[Load], holdings: Sequence[Holding], workers: int) -> None:
    """Compile everything that :func:`measure_all` times, in several processes."""
    needed = {
        (load.heads, holding.formats(load.heads.head_size)): holding
        for load in loads
        for holding in holdings
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        jobs = [pool.submit(compile_calls, heads, kept) for (heads, _), kept in needed.items()]
        for job in jobs:
            job.result()


def measure_all(
    loads: Sequence[Load],
    holdings: Sequence[Holding],
    generator: torch.Generator,
    deadline: float,
    skipped: list[str],
) -> Iterator[Row]:
    """Time every load.

    Args:
        loads: what to time, in this order.
        holdings: what requests hold in turn.
        generator: of the inputs, on the GPU.
        deadline: when to stop, in seconds of ``time.monotonic``.
        skipped: told which loads were not timed, and why.
    """
    copy = DeviceCopy()
    for load in loads:
        if time.monotonic() > deadline:
            skipped.append(f"{load.name}: no time left")
        elif load.full_bytes > MEMORY_SHARE * free_memory():
            skipped.append(f"{load.name}: {load.full_bytes / 1e9:.0f} GB do not fit")
        else:
            rate = copy.bytes_per_second()
            yield from _rivals(load, rate, generator)
            for holding in holdings:
                yield from _ours(load, holding, rate, generator)


def _ours(load: Load, holding: Holding, rate: float, generator: torch.Generator) -> Iterator[Row]:
    """Both of ours on the same inputs."""
    free_memory()
    sets = sets_for(load.full_bytes * holding.budget)
    inputs = build(load, holding, sets, generator.device, generator)
    sizes = inputs.kv_bytes, inputs.moved_bytes
    for kernel in kernels():
        timing = time_calls(Call(inputs, generator.device, kernel).step, sets)
        yield _row(load, kernel.name, holding.name, holding.budget, timing, sizes, rate)


def _rivals(load: Load, rate: float, generator: torch.Generator) -> Iterator[Row]:
    free_memory()
    sets = sets_for(load.full_bytes)
    cache = FullCache.random(load, sets, generator)
    query = cache.queries[0]
    moved = load.full_bytes + 2 * query.numel() * query.element_size()
    for name, prepare in RIVALS.items():
        timing, note = _try(prepare, cache, sets)
        sizes = load.full_bytes, moved
        yield _row(load, name, "full", 1.0, timing, sizes, rate, note)


def _try(prepare: Callable[[FullCache], Step], cache: FullCache, sets: int) -> tuple[Timing, str]:
    """Time a kernel that may not be there, may not take these shapes, or may not be captured."""
    try:
        step = prepare(cache)
        error = cache.error(step(sets - 1), sets - 1)
    except ImportError as missing:
        return NOT_TIMED, f"not importable: {missing}"
    except Exception as refused:  # other people's kernels raise what they like
        return NOT_TIMED, f"{type(refused).__name__}: {refused}"
    if not error <= MAX_ERROR:
        return NOT_TIMED, f"wrong result, relative error {error:.1e}"
    try:
        return time_calls(step, sets), ""
    except RuntimeError as refused:
        try:
            return time_calls(step, sets, in_graph=False), f"not in a graph: {refused}"
        except RuntimeError as also:
            return NOT_TIMED, f"{type(also).__name__}: {also}"


def _row(
    load: Load,
    kernel: str,
    holding: str,
    budget: float,
    timing: Timing,
    sizes: tuple[int, int],
    rate: float,
    note: str = "",
) -> Row:
    return Row(
        load.heads.name,
        load.batch,
        load.tokens,
        kernel,
        holding,
        budget,
        timing.seconds * 1e6,
        timing.spread,
        timing.in_graph,
        *sizes,
        rate,
        note,
    )
