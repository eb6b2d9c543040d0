"""Order statistics on the device, interpreted, against sorting."""

import interpreter
import pytest
import torch

pytest.importorskip("triton")

import select_calls


@pytest.fixture(scope="module")
def process():
    with interpreter.start() as running:
        yield running


ROWS = {
    "one": torch.ones(1),
    "random": torch.randn(3000),
    "a tile": torch.randn(1024),
    "counters that fill": torch.full((15 * 1024 + 3,), 2.5),
    "many tiles": torch.randn(40_000) ** 5,
    "ties": torch.randint(-3, 3, (2500,)).float(),
    "huge and tiny": torch.tensor([3e38, -3e38, 1e-44, -1e-44, 0.0, 1.0, -1.0]),
    "not to be had": torch.where(torch.arange(2000) % 3 == 0, torch.randn(2000), -torch.inf),
    "infinite": torch.tensor([torch.inf, -torch.inf, 0.0]),
}


@pytest.mark.parametrize("name", ROWS)
def test_kth_largest(process, name):
    torch.manual_seed(0)
    row = ROWS[name]
    ranks = sorted({1, len(row), (len(row) + 1) // 2, max(1, len(row) // 7)})
    found = process.submit(select_calls.select, row, ranks).result()
    expected = row.sort(descending=True).values[torch.tensor(ranks) - 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ROWS)
def test_nearly(process, name):
    """Five digits of eight: sign, exponent and eleven bits."""
    row = ROWS[name]
    ranks = sorted({1, len(row), (len(row) + 1) // 2})
    found = process.submit(select_calls.select, row, ranks, 5).result()
    expected = row.sort(descending=True).values[torch.tensor(ranks) - 1]
    torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-41)
