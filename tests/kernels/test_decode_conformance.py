"""Every decode kernel against the float64 reference, on random ragged leases."""

import cuda_host.process
import decode_runners
import interpreter
import pytest
import torch
from decode_runners import BF16, FP16, FP32, Case, run_ragged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdkv_vllm.testing.leases import EVERY_FORMAT, Model, Request

DTYPES = (BF16, FP16, FP32)


@pytest.fixture(scope="module")
def runner(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        with interpreter.start() as process:
            yield decode_runners.triton(process)
    elif request.param == "cuda":
        library = request.getfixturevalue("cuda_host_library")
        with cuda_host.process.start(library) as process:
            yield decode_runners.cuda(process)
    else:
        yield getattr(decode_runners, request.param)()


ALL = [
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.slow),
]
pytestmark = pytest.mark.parametrize("runner", ALL, indirect=True, scope="module")


def of(runner, dtype=None):
    """A cache's type that the runner takes: the one asked for, or leave the test out."""
    if dtype is not None and dtype not in runner.dtypes:
        pytest.skip(f"{runner.name} takes no caches in {dtype}")
    return dtype or (FP32 if FP32 in runner.dtypes else FP16)


class OneToken(Case):
    """Every list of every lease has one token."""

    def draw_tokens(self, lease_blocks, fill):
        return torch.ones(self.layout.table_shape[:3], dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_single_format(runner, name, dtype):
    model = Model(names=(name,), dtype=of(runner, dtype))
    case = Case(runner, model, [Request(8, 37), Request(0, 70)])
    case.check([0, 1], case.totals)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_size", [8, 32, 40, 64, 72, 80, 96, 112, 128, 256, 512])
def test_head_sizes(runner, head_size, dtype):
    if head_size not in runner.head_sizes:
        pytest.skip(f"{runner.name} is not tried with heads of {head_size}")
    names = ("r4", "i8", "i4", "i2", "full") + (("r32i8",) if head_size > 32 else ())
    run_ragged(runner, Model(names, head_size, dtype=dtype), seed=head_size)


@pytest.mark.parametrize(
    ("head_size", "group", "dtype"),
    [
        (64, 1, FP16), (128, 4, BF16), (128, 8, FP16), (256, 1, BF16), (256, 8, BF16),
        (96, 4, BF16), (80, 8, FP16), (32, 4, BF16), (112, 8, BF16), (80, 1, BF16), (96, 8, BF16),
    ],
)  # fmt: skip
def test_groups_of_head_sizes(runner, head_size, group, dtype):
    if head_size not in runner.head_sizes:
        pytest.skip(f"{runner.name} is not tried with heads of {head_size}")
    names = tuple(name for name in EVERY_FORMAT if head_size > 32 or name != "r32i8")
    run_ragged(runner, Model(names, head_size, group, dtype=dtype), seed=head_size + group)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 9, 16, 17])
def test_groups(runner, group):
    run_ragged(runner, Model(EVERY_FORMAT, kv_heads=1, group=group, dtype=FP16), seed=group)


@pytest.mark.parametrize("dtype", [BF16, None])
@pytest.mark.parametrize("block_size", [8, 32, 48, 128])
def test_block_sizes(runner, block_size, dtype):
    run_ragged(runner, Model(EVERY_FORMAT, block_size=block_size, dtype=of(runner, dtype)))


@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(runner, dtype, query_dtype):
    run_ragged(runner, Model(EVERY_FORMAT, dtype=of(runner, dtype), query_dtype=query_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_basis(runner, dtype):
    names = ("r8", "r24", "r16i4", "full")
    model = Model(names, dtype=of(runner, dtype), prompt_basis_rank=24, block_size=8)
    run_ragged(runner, model)


@pytest.mark.parametrize(
    ("head_size", "names"),
    [
        (64, ("r4", "r4i2", "r8i4")),
        (64, ("r60", "r12i8")),
        (64, ("r32", "r48i2")),
        (80, ("r32", "r48i2", "r64i4")),
        (64, ("r8", "r24", "r12", "r48")),
        (64, ("r12i8", "r20i8", "r32i8", "r48i8")),
        (96, ("r64i8", "r32i8", "r12i8", "r92i4")),
        (256, ("r200i2", "r100i4", "r252i8")),
    ],
)
def test_ranks(runner, head_size, names):
    if head_size not in runner.head_sizes:
        pytest.skip(f"{runner.name} is not tried with heads of {head_size}")
    # Of a seed for which no output is so small that what rounding leaves is more than its share.
    run_ragged(runner, Model(names, head_size, 4, dtype=of(runner)), seed=1)


def test_empty_lists(runner):
    case = Case(runner, Model(), [Request(4, 1, fill=0.0), Request(4, 20, fill=0.0)])
    case.check([0, 1], case.totals)


def test_lease_without_tail(runner):
    case = Case(runner, Model(), [Request(6, 0)])
    case.check([0], case.totals)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 33])
def test_leases(runner, count):
    """As many leases as a row may have, of any sizes, and one lease fewer."""
    model = Model(("i8", "i4", "r16", "full"), dtype=of(runner), kv_heads=1, max_leases=count)
    least, random = model.layout().min_blocks, torch.Generator().manual_seed(count)
    sizes = (least + torch.randint(6, (count,), generator=random)).tolist()
    fill = torch.rand(count, generator=random).tolist()
    requests = [
        Request(tuple(sizes), 40, 1, tuple(fill)),
        Request(tuple(sizes[1:]), 1, 0),
        Request((), 20),
    ]
    case = Case(runner, model, requests, seed=count)
    case.check([0, 1, 2, 0], [*case.totals, case.totals[0] - 39])


ANY_REQUEST = st.builds(
    Request,
    st.lists(st.integers(3, 9), max_size=5).map(tuple),
    st.integers(0, 40),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.3, 1.0]),
).filter(lambda request: request.lease_blocks or request.tail_tokens)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ANY_REQUEST, min_size=1, max_size=4), st.integers(0, 2**16))
def test_any_requests(runner, requests, seed):
    model = Model(("i4", "i8", "r16", "full"), dtype=of(runner), kv_heads=1, max_leases=5)
    case = Case(runner, model, requests, seed)
    case.check(list(range(len(requests))), case.totals)


def test_lists_of_one_token(runner):
    """In each of several leases, so that no page but the last of a list could be full."""
    model = Model(EVERY_FORMAT, dtype=of(runner), max_leases=6)
    case = OneToken(runner, model, [Request((12,) * 6, 3), Request((12, 12), 0)])
    case.check([0, 1], case.totals)


def test_no_lease_at_all(runner):
    case = Case(runner, Model(names=("full",)), [Request(0, n) for n in (1, 15, 16, 17, 700)])
    case.check([0, 1, 2, 3, 4], case.totals)


def test_more_queries_than_a_launch_takes(runner):
    case = Case(runner, Model(names=EVERY_FORMAT), [Request(6, 5), Request(0, 40)], most=2)
    first, second = case.totals
    case.check([0, 1, 0, 1, 1], [first, second, first - 2, 7, second])


def test_padding_row(runner):
    """A query of length 0 gives zeros, whatever its row is."""
    case = Case(runner, Model(names=EVERY_FORMAT), [Request(6, 5)])
    output, lse = case.outputs([10**6, 0], [0, case.totals[0]])
    assert (output[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert output[1].isfinite().all()


def test_extreme_scales(runner):
    """Scales of V from nothing to the largest in one list."""
    case = Case(runner, Model(names=("i8",), kv_heads=1, layers=1, group=1), [Request(8, 3)])
    fmt = case.layout.formats.formats[0]
    for power, block in zip((-126, -60, -9, 0, 9, 60), case.block_table[0, 4:], strict=False):
        page = case.kv_cache[int(block)].view(torch.uint8).flatten()
        scales = page[fmt.scales_offset + 2 * fmt.tokens_per_page :][: 2 * fmt.tokens_per_page]
        scales.view(torch.bfloat16)[:] = 2.0**power
    case.check([0], case.totals, layer=0)


def test_large_scores_do_not_overflow(runner):
    case = Case(runner, Model(query_dtype=FP32), [Request(8, 50)])
    case.kv_cache[case.block_table[0, -1].long(), :, :2] *= 60
    case.check([0], case.totals)


def test_nan_is_not_hidden(runner):
    case = Case(runner, Model(), [Request(0, 50)])
    case.kv_cache[case.block_table[0, 0].long(), 0, 3] = torch.nan
    output, _ = case.outputs([0], case.totals)
    assert output[:, : case.model.group].isnan().all()
    assert not output[:, case.model.group :].isnan().any()
