"""What the kit runs on: a GPU, or in a rehearsal the CPU, where no time means anything."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch

REHEARSAL = "MDKV_GPU_REHEARSAL"
"""Set to 1 in the environment of a rehearsal's processes."""


class Device(Protocol):
    """Where kernels run, and how they are timed there."""

    where: torch.device
    l2_bytes: int
    captures: bool
    """Whether calls can be captured in CUDA graphs."""

    def facts(self) -> dict[str, Any]:
        """Names and versions, for the record."""
        ...

    def free_memory(self) -> int:
        """Bytes that can be allocated, after everything that is no longer used is given back."""
        ...

    def seconds(self, run: Callable[[], object], rounds: int) -> list[float]:
        """Time of each of some calls in a row."""
        ...

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """Something that has the effect of a call, without its launches where that can be."""
        ...

    def synchronize(self) -> None:
        """Wait for everything."""
        ...


class Gpu:
    """:class:`Device`: torch's current GPU."""

    captures = True

    def __init__(self) -> None:
        self.where = torch.device("cuda")
        self.l2_bytes: int = torch.cuda.get_device_properties(0).L2_cache_size

    def facts(self) -> dict[str, Any]:
        """See :class:`Device`."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }

    def free_memory(self) -> int:
        """See :class:`Device`."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def seconds(self, run: Callable[[], object], rounds: int) -> list[float]:
        """See :class:`Device`."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """See :class:`Device`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def synchronize(self) -> None:
        """See :class:`Device`."""
        torch.cuda.synchronize()


class Rehearsal:
    """:class:`Device`: the CPU, with kernels that are interpreted or compiled for it."""

    where = torch.device("cpu")
    l2_bytes = 1 << 10
    captures = False

    def facts(self) -> dict[str, Any]:
        """See :class:`Device`."""
        return {"gpu": "none, a rehearsal", "multiprocessors": os.cpu_count()}

    def free_memory(self) -> int:
        """See :class:`Device`."""
        return 1 << 30

    def seconds(self, run: Callable[[], object], rounds: int) -> list[float]:
        """See :class:`Device`; a single call, as long as it takes."""
        begin = time.perf_counter()
        run()
        return [time.perf_counter() - begin] * rounds

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """See :class:`Device`."""
        return run

    def synchronize(self) -> None:
        """See :class:`Device`."""


def rehearsing() -> bool:
    """Whether this process is one of a rehearsal."""
    return os.environ.get(REHEARSAL) == "1"


@cache
def device() -> Device:
    """The device of this process."""
    return Rehearsal() if rehearsing() else Gpu()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Under torch's synchronisation check, which is seen to work at the end."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError:
            return
        raise AssertionError("the synchronisation check finds none")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return told[0] if told else "unknown"
