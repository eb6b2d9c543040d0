"""The Triton compression kernels under Triton's interpreter, against their torch references."""

import interpreter
import pytest
import torch
from compress_calls import InterpretedKernels
from lists import ChosenBefore, assert_nearly_the_same_lists

from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.kernels import ReferenceKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.loss import Candidate
from mdkv_vllm.core.packing import unpack_list
from mdkv_vllm.core.plan import LeaseTerms, plan_lease
from mdkv_vllm.core.reference import mixed_decode
from mdkv_vllm.ops.compress import CpuKernels

pytest.importorskip("triton")

REFERENCE = ReferenceKernels()
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels():
    with interpreter.start() as process:
        yield InterpretedKernels(process)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def candidates_of(queries, keys, span, ranks, dtype):
    """Candidates that differ from the keys a little and have fewer dimensions."""
    flat = queries.flatten(1, 2)
    noise = 0.1 * torch.randn_like(keys[:, :span].float())
    read = (keys[:, :span].float() + noise).to(dtype)
    return [Candidate(flat[..., :r].to(dtype), read[..., :r], read[..., 0]) for r in ranks]


def in_double(candidates):
    return [Candidate(c.queries.double(), c.keys.double(), c.value_error) for c in candidates]


def check_loss_sums(kernels, queries, keys, candidates, span, variant):
    scale = queries.shape[-1] ** -0.5
    found = kernels.loss_sums(queries, keys, candidates, span, scale, variant)
    exact = queries.double(), keys.double(), in_double(candidates)
    expected = REFERENCE.loss_sums(*exact, span, scale, variant)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 2e-5


@pytest.mark.parametrize("variant", ["paper", "solo"])
@pytest.mark.parametrize(
    ("size", "group", "window", "span", "after", "ranks", "dtype"),
    [
        (64, 1, 1, 1, 0, (64,), torch.float32),
        (80, 3, 7, 130, 9, (12, 80), torch.float32),
        (96, 4, 32, 65, 0, (32,), torch.float16),
        (128, 8, 20, 64, 1, (16, 128), BF16),
        (256, 1, 32, 600, 33, (64,), BF16),  # more than one program's share of tokens
        (64, 4, 5, 90, 700, (), torch.float32),
    ],
)
def test_loss_sums(kernels, size, group, window, span, after, ranks, dtype, variant):
    torch.manual_seed(size + span)
    queries = (torch.randn(2, window, group, size) * 2).to(dtype)
    # As a cache hands them over: strided over tokens and heads.
    wide = torch.randn(span + after + window, 2, size + 4).to(dtype)
    keys = wide[..., :size].transpose(0, 1)
    candidates = candidates_of(queries, keys, span, ranks, dtype)
    check_loss_sums(kernels, queries, keys, candidates, span, variant)


def test_loss_sums_of_two_types(kernels):
    """Keys as the cache has them, candidates as they are read back."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 6, 2, 64).to(BF16), torch.randn(1, 100, 64).to(BF16)
    candidates = candidates_of(queries, keys, 70, (64,), torch.float32)
    check_loss_sums(kernels, queries, keys, candidates, 70, "solo")


@pytest.mark.parametrize("variant", ["paper", "solo"])
@pytest.mark.parametrize("spread", [100.0, 3000.0])
def test_sums_where_most_weights_underflow(kernels, variant, spread):
    torch.manual_seed(1)
    queries, keys = torch.randn(2, 4, 3, 64) * spread**0.5, torch.randn(2, 210, 64) * spread**0.5
    candidates = candidates_of(queries, keys, 180, (64,), torch.float32)
    found = kernels.loss_sums(queries, keys, candidates, 180, 0.125, variant)
    expected = REFERENCE.loss_sums(
        queries.double(), keys.double(), in_double(candidates), 180, 0.125, variant
    )
    assert expected[0].min() < 1e-45
    torch.testing.assert_close(found, expected.float(), rtol=5e-3, atol=1e-3)


def test_sums_stay_finite_where_a_query_sees_one_key_only(kernels):
    queries, keys = torch.ones(1, 2, 1, 64), torch.zeros(1, 40, 64)
    keys[0, 3] = 40.0
    for far in (-30.0, 0.0, 30.0, 300.0):
        read = keys[:, :32].clone()
        read[0, 3] = far
        candidate = Candidate(queries.flatten(1, 2), read, torch.zeros(1, 32))
        sums = kernels.loss_sums(queries, keys, [candidate], 32, 0.125, "solo")
        assert torch.isfinite(sums).all()
        assert sums[1].max() <= 2.001


def test_nan_is_not_hidden(kernels):
    queries, keys = torch.ones(1, 2, 1, 64), torch.zeros(1, 40, 64)
    keys[0, 5, 7] = torch.nan
    assert kernels.loss_sums(queries, keys, [], 32, 0.125, "solo").isnan().all()


@pytest.mark.parametrize("rank", [4, 12, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_round_trip(kernels, rank, bits):
    torch.manual_seed(rank + bits)
    wide = torch.randn(2, 2, 67, rank + 4) * torch.rand(67, 1) * 5
    keys, values = wide[0, ..., :rank], wide[1, ..., :rank]
    keys[0, 0] = values[0, 0] = 0.0
    read, error = kernels.round_trip(keys, values, bits)
    expected_read, expected_error = REFERENCE.round_trip(keys, values, bits)
    # Sums in another order may move the scale of int4 and int2, by one step of bfloat16.
    differ = (read != expected_read).any(-1).float().mean()
    assert differ == 0 if bits == 8 else differ < 0.02
    torch.testing.assert_close(read, expected_read, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(error, expected_error, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("size", "rank"), [(64, 64), (80, 12), (96, 96), (128, 128), (256, 20)])
def test_rotate(kernels, size, rank, dtype):
    # As a cache hands them over: strided over tokens and heads; a matrix that heads share.
    vectors = torch.randn(150, 2, size + 4).to(dtype)[..., :size].transpose(0, 1)
    square = torch.randn(size, size).t()[:, :rank]
    found = kernels.rotate(vectors, square.expand(2, -1, -1))
    assert found.dtype == torch.float32
    assert relative_error(found, vectors.double() @ square.double()) < 1e-6


def vectors_of(formats, heads, span, dtype=torch.float32):
    widest = max(f.rank for f in formats.formats)
    keys, values = torch.randn(2, heads, span, widest).to(dtype)
    return [(keys[..., : f.rank], values[..., : f.rank]) for f in formats.formats]


@pytest.mark.parametrize(
    "names", [("drop", "r8", "r16", "full"), ("i2", "i4", "i8", "full"), ("drop", "r12i4", "r32i8")]
)
@pytest.mark.parametrize(
    "geometry",
    [
        PageGeometry(16, 64, BF16),
        PageGeometry(32, 80, torch.float32),
        PageGeometry(16, 96, BF16),
        PageGeometry(16, 128, torch.float16),
        PageGeometry(8, 256, BF16),
    ],
    ids=str,
)
def test_pack(kernels, names, geometry):
    torch.manual_seed(3)
    formats, heads, span = parse_formats(names, geometry), 3, 201
    vectors = vectors_of(formats, heads, span)
    choice = torch.randint(-1 if formats.drop else 0, len(formats.formats), (heads, span))
    choice[1] = 0  # empty lists, and one over several pages
    found = torch.full((120, geometry.page_bytes), 0xAB, dtype=torch.uint8)
    expected = found.clone()
    kernels.pack(vectors, formats, choice, geometry, found, torch.tensor(2))
    REFERENCE.pack(vectors, formats, choice, geometry, expected, torch.tensor(2))
    assert (found[:2] == 0xAB).all()
    if all(f.bits >= 8 for f in formats.formats):
        assert torch.equal(found, expected)
    else:
        assert_nearly_the_same_lists(found[2:], expected[2:], formats, choice, geometry)


def test_pack_reads_the_caches_own_type(kernels):
    geometry = PageGeometry(16, 64, BF16)
    formats = parse_formats(("drop", "i8", "full"), geometry)
    vectors = vectors_of(formats, 2, 50, BF16)
    choice = torch.randint(-1, 2, (2, 50))
    found = torch.zeros(20, geometry.page_bytes, dtype=torch.uint8)
    expected = found.clone()
    kernels.pack(vectors, formats, choice, geometry, found, torch.tensor(0))
    in_float = [(keys.float(), values.float()) for keys, values in vectors]
    REFERENCE.pack(in_float, formats, choice, geometry, expected, torch.tensor(0))
    assert torch.equal(found, expected)


def test_pack_writes_no_page_that_is_not_there(kernels):
    geometry = PageGeometry(16, 64, BF16)
    formats = parse_formats(("i8", "full"), geometry)
    vectors = vectors_of(formats, 2, 100)
    room = torch.full((9, geometry.page_bytes), 0xAB, dtype=torch.uint8)
    choice = torch.ones(2, 100, dtype=torch.int64)
    kernels.pack(vectors, formats, choice, geometry, room[:5], torch.tensor(0))
    assert (room[5:] == 0xAB).all()
    keys, _ = unpack_list(room[:5], 80, formats.formats[1], geometry)
    torch.testing.assert_close(keys, vectors[1][0][0, :80].bfloat16().float())


def decoded(result, layout, plan, queries):
    """Attention over the lease alone, read from an arena in which its blocks are shuffled."""
    geometry, blocks = layout.geometry, plan.num_lease_blocks
    shape = layout.pages_per_block, geometry.block_size, 2 * geometry.head_size
    arena = torch.full((blocks + 3, *shape), torch.nan, dtype=geometry.dtype)
    places = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(1))[:blocks]
    arena[places] = result.pages.view(geometry.dtype).view(blocks, *shape)
    return [
        mixed_decode(
            query.double(),
            arena,
            layer,
            layout,
            places.int().unsqueeze(0),
            torch.zeros(len(query), dtype=torch.int32),
            torch.full((len(query),), blocks * geometry.block_size, dtype=torch.int32),
            torch.tensor([[0, blocks]], dtype=torch.int32),
            None,
            0.125,
        )[0]
        for layer, query in enumerate(queries)
    ]


BY_HEAD = HeadBudgets(torch.tensor([[0.1, 5.0], [0.1, 0.4], [2.0, 0.5]]), 0.7)


@pytest.mark.parametrize(
    ("names", "by_head", "most"),
    [
        # So few pages leave a finish that is not exhaustive well behind.
        (("drop", "i4", "i8", "full"), None, 1.3),
        (("drop", "i8", "full"), BY_HEAD, 1.1),
        (("drop", "r8", "r16i8", "full"), None, 1.3),
    ],
)
def test_a_whole_prompt(kernels, names, by_head, most):
    """Every part in its place, in two groups of layers; the reference's bytes for its choice."""
    geometry, layers, heads, window = PageGeometry(16, 64, BF16), 3, 2, 8
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, layers, heads, formats.basis_rank)
    plan = plan_lease(300, LeaseTerms(16, window, 64, 0.4, layout.min_blocks, None))
    cache = (torch.randn(layers, 2, heads, 300, 64) * torch.linspace(2, 0.2, 64)).to(BF16)
    queries = torch.randn(layers, heads * 2, window, 64)

    def compress(which, keys_and_values):
        compressor = Compressor(layout, "hybrid", 0.125, heads=by_head, kernels=which)
        return compressor.compress(lambda i: keys_and_values[i].unbind(), queries, plan, True)

    found = compress(kernels, cache)  # as the cache has it
    best = compress(CpuKernels(), cache.float())
    for ours, theirs in zip(found.allocations, best.allocations, strict=True):
        assert float(ours.objective) <= theirs.objective * most
        assert float(ours.lower_bound) == pytest.approx(theirs.lower_bound, rel=0.02)
    expected = compress(ChosenBefore(found.allocations), cache.float())
    lists = layout.lists_first_page
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pages[:lists], expected.pages[:lists])
    choice = torch.cat([a.choice for a in found.allocations])
    assert_nearly_the_same_lists(
        found.pages[lists:], expected.pages[lists:], formats, choice, geometry
    )
    assert int(formats.pages(found.tokens).sum()) <= layout.list_pages(plan.num_lease_blocks)
    query = torch.randn(layers, 5, heads * 2, 64)
    both = (decoded(result, layout, plan, query) for result in (found, expected))
    for ours, theirs in zip(*both, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
