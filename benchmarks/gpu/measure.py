"""Times loads: kernels for a full cache, and ours with less and less of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from .baselines import BASELINES, MAX_ERROR, FullCache, Step
from .call import Call, kernel_named
from .device import device
from .inputs import build
from .jobs import Row
from .loads import Holding, Load
from .report import Timed
from .timing import DeviceCopy, Timing, sets_for, time_calls

MEMORY_SHARE = 0.88
"""Of what is free, for one cache."""

NOT_TIMED = Timing(math.nan, math.nan, False)


def compile_kernels(
    load: Load, holding: Holding, batches: Sequence[int], seed: int
) -> Iterator[Row]:
    """Compile what Triton needs for some batch sizes, into its cache on disk."""
    kernel = kernel_named("Triton")
    for batch in batches:
        small = Load(load.heads, batch, min(load.tokens, 1024), load.layers)
        most = holding.max_leases(load.tokens)
        inputs = build(small, holding, 1, device().where, _generator(seed), most)
        Call(inputs, kernel).step(0)
        device().synchronize()
    yield {"kind": "compiled", "name": f"{load.heads.name}, {holding.name}"}


def time_ours(load: Load, holdings: Sequence[Holding], kernel: str, seed: int) -> Iterator[Row]:
    """Time one of our kernels on a load with each holding, beside a copy measured just before."""
    rate = DeviceCopy().bytes_per_second()
    for holding in holdings:
        needed = load.full_bytes * load.layers * holding.budget
        if needed > MEMORY_SHARE * device().free_memory():
            note = f"{needed / 1e9:.0f} GB do not fit"
            yield _row(load, kernel, holding, NOT_TIMED, (0, 0), rate, note)
            continue
        sets = 1 if load.layers > 1 else sets_for(load.full_bytes * holding.budget)
        most = holding.max_leases(load.tokens)
        inputs = build(load, holding, sets, device().where, _generator(seed), most)
        sizes = inputs.kv_bytes, inputs.moved_bytes
        call = Call(inputs, kernel_named(kernel))
        yield _row(load, kernel, holding, time_calls(call.step, call.steps), sizes, rate)
        del inputs, call


def time_full_caches(load: Load, names: Sequence[str], seed: int) -> Iterator[Row]:
    """Time other people's kernels on a full cache; each has to be right before it is timed."""
    rate = DeviceCopy().bytes_per_second()
    sets = sets_for(load.full_bytes)
    cache = FullCache.random(load, sets, _generator(seed))
    query = cache.queries[0]
    moved = load.full_bytes + 2 * query.numel() * query.element_size()
    for name in names:
        timing, note = time_baseline(BASELINES[name], cache, sets)
        yield _row(load, name, Holding("full"), timing, (load.full_bytes, moved), rate, note)


def time_baseline(
    prepare: Callable[[FullCache], Step], cache: FullCache, sets: int
) -> tuple[Timing, str]:
    """Time a kernel that may not be there, may not take these shapes, or may not be captured.

    Returns:
        Its time, and why there is none or what is special about it; empty where all is well.
    """
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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device().where).manual_seed(seed)


def _row(
    load: Load,
    kernel: str,
    holding: Holding,
    timing: Timing,
    sizes: tuple[int, int],
    rate: float,
    note: str = "",
) -> Row:
    timed = Timed(
        load.heads.name,
        load.batch,
        load.tokens,
        load.layers,
        kernel,
        holding.name,
        holding.budget,
        timing.seconds * 1e6,
        timing.spread,
        timing.in_graph,
        *sizes,
        rate,
        note,
    )
    return {"kind": "timing"} | asdict(timed) | timed.derived
