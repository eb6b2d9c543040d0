"""Time of calls on a GPU: replays of a CUDA graph between events, and the copy beside them."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .call import Call
from .inputs import build
from .loads import BATCHES, Heads, Holding, Load

COPY_BYTES = 1 << 30
ROUNDS = 15
SECONDS = 0.05
"""Time of measuring, about, beyond :data:`ROUNDS` rounds."""
MAX_ROUNDS = 200
L2_TIMES = 4
"""Bytes that take turns, in sizes of the L2 cache."""
MAX_SETS = 2048


@dataclass(frozen=True)
class Timing:
    """Time of a call.

    Attributes:
        seconds: median.
        spread: interquartile range over the median.
        in_graph: whether calls were replayed from a graph, so that no launch was waited for.
    """

    seconds: float
    spread: float
    in_graph: bool


def sets_for(call_bytes: float) -> int:
    """Sets of requests that take turns, so that none finds its bytes in the L2 cache."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(1, -int(-L2_TIMES * l2_bytes // call_bytes)), MAX_SETS)


def time_calls(step: Callable[[int], object], sets: int, in_graph: bool = True) -> Timing:
    """Time ``step``, which attends with the set of requests that it is given."""

    def every_set() -> None:
        for index in range(sets):
            step(index)

    every_set()  # compiles
    torch.cuda.synchronize()
    run = every_set
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every_set()
        run = graph.replay
    warm_up = _seconds(run, 3)
    rounds = min(max(ROUNDS, int(SECONDS / min(warm_up))), MAX_ROUNDS)
    seconds = _seconds(run, rounds)
    first, median, third = statistics.quantiles(seconds, n=4)
    return Timing(median / sets, (third - first) / median, in_graph)


def _seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Time of each round."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


class DeviceCopy:
    """A copy within the device's memory, the ceiling that rates are compared to."""

    def __init__(self) -> None:
        self.source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
        self.target = torch.empty_like(self.source)

    def bytes_per_second(self) -> float:
        """Measure now: bytes read plus bytes written."""
        timing = time_calls(lambda _: self.target.copy_(self.source), 1)
        return 2 * COPY_BYTES / timing.seconds


def compile_calls(heads: Heads, holding: Holding) -> None:
    """Compile what every batch size needs, into Triton's cache on disk."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    for batch in BATCHES:
        Call(build(Load(heads, batch, 1024), holding, 1, device, generator), device).step(0)
    torch.cuda.synchronize()


def free_memory() -> int:
    """Bytes that can be allocated, after everything that is no longer used is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
