"""What is the CUDA decode kernels' own, run on a CPU: orders of threads, shares, many units."""

import math

import decode_runners
import pytest
import torch
from cuda_host import process as host
from decode_runners import Case, run_ragged

from mdkv_vllm.core.reference import leases_of
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig
from mdkv_vllm.testing.leases import EVERY_FORMAT, Model, Request, ragged


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


def weigh_pages(case, layer, weights):
    """Weights of the pages that a layer reads, 0 of all others: ``[blocks, pages per block]``."""
    model, layout = case.model, case.layout
    weighed = torch.zeros(case.kv_cache.shape[:2], dtype=torch.int32)
    for row, blocks in enumerate(case.block_table):
        tail = 0
        for first, tail in leases_of(case.leases, row):
            table = case.kv_cache[blocks[first]].view(torch.uint8).flatten()
            table = table[: 4 * math.prod(layout.table_shape)].view(torch.int32)
            lists = table.view(layout.table_shape)[layer].tolist()
            lease = torch.zeros(tail - first, layout.pages_per_block, dtype=torch.int32)
            for head in lists:
                for fmt, (tokens, page), weight in zip(
                    layout.formats.formats, head, weights, strict=False
                ):
                    lease.view(-1)[page : page + fmt.pages(tokens)] = weight
            weighed[blocks[first:tail]] = lease
        tail_blocks = -(-case.totals[row] // model.block_size)
        heads = layer * model.kv_heads + torch.arange(model.kv_heads)
        weighed[blocks[tail:tail_blocks, None], heads] = weights[-1]
    return weighed


@pytest.mark.parametrize("leases", [1, 5])
@pytest.mark.parametrize("programs", [3, 16, 40])
def test_shares_weigh_the_same(runner, programs, leases):
    """To within a page."""
    model = Model(("r12", "i2", "i4", "full"), dtype=torch.float16, max_leases=leases)
    case = Case(runner, model, ragged(model, 40))
    count = len(case.totals)
    lengths = torch.tensor(case.totals, dtype=torch.int32)
    rows = torch.arange(count, dtype=torch.int32)
    batch = DecodeBatch(case.block_table, rows, lengths, case.leases)
    config = DecodeConfig(
        case.kv_cache, case.layout, model.group, case.calibrated, 1.0, count, leases
    )
    output, lse = torch.empty(count, 6, 64), torch.empty(count, 6)
    call = config, case.query(count, 6, 64), 1, batch, output, lse
    owners, weights = runner.process.submit(host.shares, {"programs": programs}, *call).result()
    weighed, heaviest = weigh_pages(case, 1, weights), weights.max()
    assert torch.equal(owners >= 0, weighed > 0)
    assert weights.min() < heaviest
    share = -(-weighed.sum() // programs)
    found = torch.zeros(programs, dtype=torch.int32)
    found.index_add_(0, owners[owners >= 0], weighed[owners >= 0])
    assert ((found - share).abs()[:-1] < heaviest).all()
    assert found[-1] < share + heaviest


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
