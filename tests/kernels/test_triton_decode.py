"""The Triton decode kernel under Triton's interpreter, against the float64 reference."""

import interpreter
import leases
import pytest
import torch
from leases import Model, Request, ragged

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
"""Relative error by cache or query type, mostly of weights rounded to it. (The interpreter cuts
bfloat16 off where a GPU rounds.)"""

EVERY_FORMAT = ("r16", "r32i8", "i8", "i4", "i2", "full")


@pytest.fixture(scope="module")
def process():
    with interpreter.start() as running:
        yield running


class Case(leases.Case):
    """Runs the Triton kernel in the interpreter's process."""

    lse_error = 2e-3  # in bfloat16, queries rotated into a basis are rounded again

    def __init__(self, process, model, requests, seed=0, programs=24):
        super().__init__(model, requests, seed)
        self.process, self.programs = process, programs

    def decode(self, query, layer, query_rows, lengths, scale, output, lse):
        requests = (self.block_table, query_rows, lengths, self.leases)
        done = self.process.submit(
            interpreter.decode,
            self.layout,
            self.model.group,
            self.calibrated,
            self.programs,
            query,
            self.arena,
            layer,
            requests,
            scale,
            output,
            lse,
        )
        *results, recent = done.result()
        for written, result in zip((output, lse), results, strict=True):
            written.copy_(result)
        assert torch.equal(recent, query)

    def query(self, *shape):
        """Of numbers that the cache's type has too: the kernel multiplies in that type."""
        return super().query(*shape).to(self.model.dtype).to(self.model.query_dtype)

    def tolerance(self):
        return max(TOLERANCE[self.model.dtype], TOLERANCE[self.model.query_dtype])


def run_ragged(process, model, seed=0):
    case = Case(process, model, ragged(model.layout().min_blocks + 2), seed)
    rows = [0, 1, 2, 3, 4, 1, 1]
    totals = [case.totals[row] for row in rows]
    totals[5] -= 33  # several queries of a row, of different lengths
    totals[6] = 1
    case.check(rows, totals)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_single_format(process, name, dtype):
    case = Case(process, Model(names=(name,), dtype=dtype), [Request(8, 37), Request(0, 70)])
    case.check([0, 1], case.totals)


@pytest.mark.parametrize(
    ("head_size", "group"), [(64, 1), (64, 17), (80, 3), (96, 4), (128, 8), (256, 1)]
)
def test_head_sizes_and_groups(process, head_size, group):
    model = Model(names=EVERY_FORMAT, head_size=head_size, group=group, dtype=torch.float16)
    run_ragged(process, model, seed=head_size + group)


@pytest.mark.parametrize("block_size", [8, 48])
def test_block_sizes(process, block_size):
    run_ragged(process, Model(names=EVERY_FORMAT, block_size=block_size, dtype=torch.float32))


@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16])
def test_query_types(process, query_dtype):
    run_ragged(process, Model(dtype=query_dtype, query_dtype=query_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_basis(process, dtype):
    names = ("r8", "r24", "r16i4", "full")
    run_ragged(process, Model(names=names, dtype=dtype, prompt_basis_rank=24, block_size=8))


@pytest.mark.parametrize("names", [("r4", "r4i2", "r8i4"), ("r60", "r12i8"), ("r32", "r48i2")])
def test_ranks(process, names):
    run_ragged(process, Model(names=names, group=4, dtype=torch.float32))


def test_empty_lists(process):
    case = Case(process, Model(), [Request(4, 1, fill=0.0), Request(4, 20, fill=0.0)])
    case.check([0, 1], case.totals)


def test_lease_without_tail(process):
    case = Case(process, Model(), [Request(6, 0)])
    case.check([0], case.totals)


def test_no_lease_at_all(process):
    case = Case(process, Model(names=("full",)), [Request(0, n) for n in (1, 15, 16, 17, 300)])
    case.check([0, 1, 2, 3, 4], case.totals)


@pytest.mark.parametrize("programs", [1, 40, 10_000])
def test_any_split(process, programs):
    model = Model(names=EVERY_FORMAT, kv_heads=1, dtype=torch.float32)
    case = Case(process, model, [Request(40, 150), Request(4, 3)], programs=programs)
    case.check([0, 1], case.totals)


def test_padding_row(process):
    """A query of length 0 gives zeros, whatever its row is."""
    case = Case(process, Model(names=EVERY_FORMAT), [Request(6, 5)])
    shape = (2, case.model.kv_heads * case.model.group, case.model.head_size)
    output, lse = torch.full(shape, torch.nan), torch.full(shape[:2], torch.nan)
    rows, lengths = torch.tensor([10**6, 0]), torch.tensor([0, case.totals[0]])
    case.decode(torch.ones(shape), 0, rows.int(), lengths.int(), 1.0, output, lse)
    assert (output[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert output[1].isfinite().all()


def test_extreme_scales(process):
    """Scales of V from nothing to the largest in one list, and large scores."""
    model = Model(names=("i8",), kv_heads=1, layers=1, group=1)
    case = Case(process, model, [Request(8, 3)])
    fmt = case.layout.formats.formats[0]
    for power, block in zip((-126, -60, -9, 0, 9, 60), case.block_table[0, 4:], strict=False):
        page = case.arena[int(block)].view(torch.uint8).flatten()
        scales = page[fmt.scales_offset + 2 * fmt.tokens_per_page :][: 2 * fmt.tokens_per_page]
        scales.view(torch.bfloat16)[:] = 2.0**power
    case.check([0], case.totals, layer=0)


def test_nan_is_not_hidden(process):
    case = Case(process, Model(), [Request(0, 50)])
    case.arena[case.block_table[0, 0].long(), 0, 3] = torch.nan
    shape = (1, case.model.kv_heads * case.model.group, case.model.head_size)
    output, lse = torch.full(shape, torch.nan), torch.full(shape[:2], torch.nan)
    lengths = torch.tensor(case.totals, dtype=torch.int32)
    case.decode(torch.ones(shape), 0, torch.zeros(1).int(), lengths, 1.0, output, lse)
    assert output[:, : case.model.group].isnan().all()
    assert not output[:, case.model.group :].isnan().any()
