"""What is the CUDA decode kernels' own, run on a CPU: orders of threads, shares, many units."""

import decode_runners
import pytest
import torch
from cuda_host import process as host
from decode_runners import Case, run_ragged

from mdkv_vllm.testing.leases import Model, Request

EVERY_FORMAT = ("r16", "r32i8", "i8", "i4", "i2", "full")


@pytest.fixture(scope="module")
def runner(cuda_host_library):
    with host.start(cuda_host_library) as running:
        yield decode_runners.cuda(running)


@pytest.mark.parametrize("order", host.ORDERS)
def test_orders(runner, order):
    """Whatever order threads and copies run in, if barriers and waits are where they should be."""
    run_ragged(runner, Model(EVERY_FORMAT, group=8, dtype=torch.float16), order=order)


@pytest.mark.parametrize("programs", [1, 2, 7, 40, 1000])
def test_any_number_of_warps(runner, programs):
    model = Model(EVERY_FORMAT, kv_heads=1, dtype=torch.float16)
    case = Case(runner, model, [Request(40, 150), Request(4, 3)], programs=programs)
    case.check([0, 1], case.totals)


def test_many_units(runner):
    """More units than threads look through at a time, most of them without any page."""
    case = Case(runner, Model(kv_heads=1, group=2), [Request(4, 9), Request(0, 100)])
    rows, totals = [0, 1] * 3, case.totals * 3
    padding = [1] * 70
    case.check([*rows, *padding, 0, 1], [*totals, *padding, *case.totals])
    lengths, rows = [0] * 90, [10**6] * 90
    lengths[77], rows[77] = 5, 1
    output, _ = case.outputs(rows, lengths)
    seen = output.flatten(1).count_nonzero(dim=1) > 0
    assert seen.nonzero().flatten().tolist() == [77]
