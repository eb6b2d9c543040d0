"""Time of calls: replays of a CUDA graph between events, and the copy beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .device import device, rehearsing

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
    return min(max(1, -int(-L2_TIMES * device().l2_bytes // call_bytes)), MAX_SETS)


def time_calls(step: Callable[[int], object], sets: int, in_graph: bool = True) -> Timing:
    """Time ``step``, which is given the number of one of ``sets`` sets of inputs."""

    def every_set() -> None:
        for index in range(sets):
            step(index)

    every_set()  # compiles
    device().synchronize()
    in_graph = in_graph and device().captures
    run = device().captured(every_set) if in_graph else every_set
    warm_up = device().seconds(run, 3)
    rounds = min(max(ROUNDS, int(SECONDS / min(warm_up))), MAX_ROUNDS)
    seconds = device().seconds(run, rounds)
    first, median, third = statistics.quantiles(seconds, n=4)
    return Timing(median / sets, (third - first) / median, in_graph)


class DeviceCopy:
    """A copy within the device's memory, the ceiling that rates are compared to.

    Made by a kernel: in a graph, ``copy_`` becomes a copy node, which was seen to reach 0.6 of what
    kernels read.
    """

    def __init__(self) -> None:
        size = COPY_BYTES >> 14 if rehearsing() else COPY_BYTES
        self.source = torch.empty(size // 8, dtype=torch.int64, device=device().where).random_()
        self.target = torch.empty_like(self.source)

    def bytes_per_second(self) -> float:
        """Measure now: bytes read plus bytes written."""
        timing = time_calls(lambda _: torch.bitwise_not(self.source, out=self.target), 1)
        return 2 * self.source.nbytes / timing.seconds
