"""How many programs share a batch, and that they have enough bytes in flight."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from compiler import compile_kernel
from hypothesis import given
from hypothesis import strategies as st
from test_triton_compile import DEFAULT, shape_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mdkv_vllm.kernels.triton.attend import attend_split
from mdkv_vllm.kernels.triton.splits import (
    MAX_SPLITS,
    MIN_PAGES,
    MIN_SPLITS,
    STAGES,
    Multiprocessor,
    SplitPlan,
    programs_per_multiprocessor,
    resident_programs,
)

GPUS = {80: Multiprocessor(1 << 16, 164 << 10, 64), 90: Multiprocessor(1 << 16, 228 << 10, 64)}

IN_FLIGHT = {80: 12 << 10, 90: 16 << 10}
"""Bytes per multiprocessor that cover a latency of 700 ns: 2.0 TB/s on 108 of an A100, 3.0 TB/s on
132 of an H100."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (214, 13312, 2, 4),  # two warps of 6,912 registers fit a quarter of 16,384
        (128, 1024, 2, 8),
        (128, 60 << 10, 2, 3),  # of 228 KiB
        (32, 0, 4, 16),  # of 64 warps
        (32, 0, 1, 24),
        (255, 0, 4, 2),
        (255, 0, 16, 0),
    ],
)
def test_programs_of_a_multiprocessor(registers, shared, warps, programs):
    assert GPUS[90].programs(registers, shared, warps) == programs


class Driver:
    """A GPU of which Triton needs to know no more than what it compiles for."""

    def __init__(self, registers, max_threads=1024):
        self.loaded = []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        )
        self._result = (object(), object(), registers, 0, max_threads)

    def _load(self, name, *_):
        self.loaded.append(name)
        return self._result

    def launcher_cls(self, *_):
        return object()

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize(("registers", "programs"), [(214, 4), (128, 8), (255, 4)])
def test_the_kernel_that_will_run_is_asked(monkeypatch, registers, programs):
    gpu = Driver(registers)
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(
        attend_split,
        "device_caches",
        type(attend_split.device_caches)(attend_split.device_caches.default_factory),
    )
    shape = shape_of(DEFAULT)
    assert programs_per_multiprocessor(shape, GPUS[90]) == programs
    assert gpu.loaded == ["attend_split"]


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("max_leases", [1, 32])
def test_enough_bytes_in_flight(capability, head_size, max_leases):
    shape = shape_of(DEFAULT, head_size, max_leases=max_leases)
    compiled = compile_kernel("attend", shape, capability)
    resident = GPUS[capability].programs(compiled.registers, compiled.shared, shape.num_warps)
    assert resident * STAGES * shape.page_bytes >= IN_FLIGHT[capability]


def test_without_a_gpu_nothing_is_compiled():
    assert resident_programs(shape_of(DEFAULT), torch.device("cpu")) > 0


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 3000))
def test_a_plan_fills_the_device_where_it_can(queries, heads, programs):
    plan = SplitPlan.of(queries, heads, programs)
    assert MIN_SPLITS <= plan.splits <= MAX_SPLITS
    assert plan.splits & (plan.splits - 1) == 0
    assert plan.min_pages >= MIN_PAGES
    units = queries * heads
    assert units * plan.splits >= programs or plan.splits == MAX_SPLITS
    assert units * plan.splits < 2 * programs + units or plan.splits == MIN_SPLITS
