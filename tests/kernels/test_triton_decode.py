"""What is the Triton decode kernel's own, interpreted: any number of programs share a batch."""

import decode_runners
import interpreter
import pytest
import torch
from decode_runners import Case

from mdkv_vllm.testing.leases import EVERY_FORMAT, Model, Request

pytestmark = pytest.mark.slow

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def runner():
    with interpreter.start() as running:
        yield decode_runners.triton(running)


@pytest.mark.parametrize("programs", [1, 40, 10_000])
def test_any_split(runner, programs):
    model = Model(EVERY_FORMAT, kv_heads=1, dtype=torch.float32)
    case = Case(runner, model, [Request(40, 150), Request(4, 3)], programs=programs)
    case.check([0, 1], case.totals)
