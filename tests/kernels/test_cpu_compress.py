"""The C++ parts of compression against their torch references."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.compress import CompressedSegment, Compressor
from mdkv_vllm.core.formats import FormatSet, PageGeometry, parse_formats
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.kernels import CompressionKernels, ReferenceKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.loss import Candidate
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.kernels.cpu import cpu_isas
from mdkv_vllm.kernels.cpu.compress import CpuKernels
from mdkv_vllm.testing.lists import assert_nearly_the_same_lists
from mdkv_vllm.testing.plans import whole_prompt

FAST, REFERENCE = CpuKernels(), ReferenceKernels()
GEOMETRY = PageGeometry(16, 64, torch.bfloat16)


class SameLosses(ReferenceKernels):
    """The reference but for the losses, so that both allocate the same."""

    round_trip = CpuKernels.round_trip
    loss_sums = CpuKernels.loss_sums


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield lambda: torch.set_num_threads(1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rank", [4, 12, 16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_round_trip(rank: int, bits: int):
    wide = torch.randn(2, 3, 130, rank + 16) * torch.rand(130, 1) * 5
    keys, values = wide[0, ..., :rank], wide[1, ..., :rank]
    keys[0, 0] = values[0, 0] = 0.0
    read, error = FAST.round_trip(keys, values, bits)
    expected_read, expected_error = REFERENCE.round_trip(keys, values, bits)
    # A code on a threshold may fall to either side of it.
    differ = (read - expected_read).abs() > 1e-5 * expected_read.abs().amax(-1, keepdim=True)
    assert differ.float().mean() < 2e-3
    torch.testing.assert_close(error, expected_error, rtol=2e-2, atol=1e-6)
    assert (error - expected_error).abs().sum() <= 1e-3 * expected_error.sum()


@given(
    heads=st.integers(1, 3),
    window=st.integers(1, 64),
    group=st.integers(1, 8),
    span=st.integers(1, 400),
    after=st.integers(0, 200),
    size=st.sampled_from([32, 64, 80, 96, 128]),
    ranks=st.lists(st.sampled_from([4, 8, 12, 32]), max_size=3),
    loss=st.sampled_from(["paper", "solo"]),
    seed=st.integers(0, 1000),
)
def test_loss_sums(
    heads: int,
    window: int,
    group: int,
    span: int,
    after: int,
    size: int,
    ranks: list[int],
    loss: str,
    seed: int,
):
    torch.manual_seed(seed)
    queries = torch.randn(heads, window, group, size) * 2
    # As a cache hands them over: strided over tokens and heads.
    keys = torch.randn(span + window + after, heads, size + 4)[..., :size].transpose(0, 1)
    flat = queries.flatten(1, 2)
    candidates = [
        Candidate(flat[..., :rank], keys[:, :span, :rank] + 0.1, torch.zeros(heads, span))
        for rank in [*ranks, size]
    ]
    found = FAST.loss_sums(queries, keys, candidates, span, size**-0.5, LOSSES[loss])
    expected = REFERENCE.loss_sums(queries, keys, candidates, span, size**-0.5, LOSSES[loss])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_loss_sums_stay_finite_where_a_query_sees_one_key_only():
    queries, keys = torch.ones(1, 2, 1, 64), torch.zeros(1, 40, 64)
    keys[0, 3] = 40.0
    for far in (-30.0, 0.0, 30.0, 300.0):
        read = keys[:, :32].clone()
        read[0, 3] = far
        candidate = Candidate(queries.flatten(1, 2), read, torch.zeros(1, 32))
        for kernels in (FAST, REFERENCE):
            sums = kernels.loss_sums(queries, keys, [candidate], 32, 0.125, LOSSES["solo"])
            assert torch.isfinite(sums).all()
            assert sums[1].max() <= 2.001


def random_losses(options: int, heads: int, span: int, ties: bool) -> torch.Tensor:
    scale = torch.rand(1, heads, span).pow(8) * 10 + 1e-4
    losses = scale * torch.rand(options, heads, span).sort(0, descending=True).values
    losses[-1] = 0
    return (losses * 8).round() / 8 if ties else losses


@given(
    names=st.sampled_from(
        [
            ("drop", "i4", "i8", "full"),
            ("i2", "i4", "i8", "full"),
            ("drop", "full"),
            ("i4",),
            ("drop", "r8", "r16", "r32", "i4", "i8", "full"),
            ("r4", "r8", "r12", "r16", "r32", "i2", "i4", "i8", "full"),
        ]
    ),
    heads=st.integers(1, 4),
    span=st.integers(1, 500),
    fraction=st.floats(0, 1),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_allocate_is_the_reference_s(
    names: tuple[str, ...], heads: int, span: int, fraction: float, ties: bool, seed: int
):
    torch.manual_seed(seed)
    formats = parse_formats(names, GEOMETRY)
    losses = random_losses(len(formats.names), heads, span, ties)
    least = 0 if formats.drop else heads * formats.formats[0].pages(span)
    most = heads * formats.formats[-1].pages(span)
    num_pages = least + round(fraction * (most - least))
    (found,) = FAST.allocate([losses], formats, [[num_pages]])
    (expected,) = REFERENCE.allocate([losses], formats, [[num_pages]])
    assert torch.equal(found.choice, expected.choice)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.objective == pytest.approx(expected.objective)
    assert found.lower_bound == pytest.approx(expected.lower_bound, abs=1e-9)


def test_allocate_names_what_is_wrong():
    formats = parse_formats(("i4", "full"), GEOMETRY)
    with pytest.raises(ValueError, match="cannot hold"):
        FAST.allocate([torch.rand(2, 3, 100)], formats, [[5]])
    with pytest.raises(RuntimeError, match="losses: "):
        FAST.allocate([torch.rand(2, 3, 100).double()], formats, [[50]])
    with pytest.raises(RuntimeError, match="tokens_per_page: "):
        FAST.allocate([torch.rand(3, 3, 100)], formats, [[50]])


def vectors_of(
    formats: FormatSet, heads: int, span: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    widest = max(f.rank for f in formats.formats)
    keys, values = torch.randn(2, heads, span, widest)
    return [(keys[..., : f.rank], values[..., : f.rank]) for f in formats.formats]


@pytest.mark.parametrize(
    "names",
    [("drop", "r8", "r16", "full"), ("i2", "i4", "i8", "full"), ("drop", "r12i4", "r32i8")],
)
@pytest.mark.parametrize(
    "geometry",
    [GEOMETRY, PageGeometry(32, 80, torch.float32), PageGeometry(16, 128, torch.float16)],
    ids=str,
)
def test_pack(names: tuple[str, ...], geometry: PageGeometry):
    formats, heads, span = parse_formats(names, geometry), 3, 700
    vectors = vectors_of(formats, heads, span)
    choice = torch.randint(-1 if formats.drop else 0, len(formats.formats), (heads, span))
    choice[1] = 0
    found = torch.full((heads * span, geometry.page_bytes), 0xAB, dtype=torch.uint8)
    expected = found.clone()
    FAST.pack(vectors, formats, choice, geometry, found, torch.tensor(3))
    REFERENCE.pack(vectors, formats, choice, geometry, expected, torch.tensor(3))
    assert (found[:3] == 0xAB).all()
    if all(f.bits >= 8 for f in formats.formats):
        assert torch.equal(found, expected)
        return
    assert_nearly_the_same_lists(found[3:], expected[3:], formats, choice, geometry)


def compress(
    kernels: CompressionKernels,
    names: tuple[str, ...],
    budget: float,
    loss: str = "hybrid",
    basis_rank: int = 0,
    size: int = 64,
    by_head: HeadBudgets | None = None,
) -> tuple[CompressedSegment, LeaseLayout]:
    torch.manual_seed(3)
    layers, heads, group, tokens, window = 2, 3, 3, 500, 24
    geometry = PageGeometry(16, size, torch.bfloat16)
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, layers, heads, basis_rank)
    floor = None if formats.drop else formats.formats[0].tokens_per_page
    segment = whole_prompt(tokens, 16, window, budget, layout.min_blocks, floor)
    cache = torch.randn(layers, 2, heads, tokens, size) * torch.linspace(2, 0.2, size)
    queries = torch.randn(layers, heads * group, window, size)
    compressor = Compressor(layout, LOSSES[loss], size**-0.5, heads=by_head, kernels=kernels)
    result = compressor.compress(
        lambda layer: (cache[layer, 0], cache[layer, 1]), queries, segment, True
    )
    return result, layout


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("loss", ["paper", "hybrid"])
@pytest.mark.parametrize(
    ("names", "budget", "basis_rank"),
    [
        (("drop", "i4", "i8", "full"), 0.3, 0),
        (("i2", "i4", "i8", "full"), 0.4, 0),
        (("drop", "r8", "r16", "full"), 0.5, 16),
        (("drop", "r16i8", "i8"), 0.5, 16),
    ],
)
def test_lease_of_the_same_losses(
    names: tuple[str, ...], budget: float, basis_rank: int, loss: str, size: int
):
    found, layout = compress(FAST, names, budget, loss, basis_rank, size)
    expected, _ = compress(SameLosses(), names, budget, loss, basis_rank, size)
    assert torch.equal(found.tokens, expected.tokens)
    for ours, theirs in zip(found.allocations, expected.allocations, strict=True):
        assert torch.equal(ours.choice, theirs.choice)
    lists = layout.lists_first_page
    assert torch.equal(found.pages[:lists], expected.pages[:lists])
    if all(f.bits >= 8 for f in layout.formats.formats):
        assert torch.equal(found.pages, expected.pages)
        return
    choice = torch.cat([a.choice for a in expected.allocations])
    assert_nearly_the_same_lists(
        found.pages[lists:], expected.pages[lists:], layout.formats, choice, layout.geometry
    )


@pytest.mark.parametrize("names", [("drop", "i4", "i8", "full"), ("i2", "i4", "i8", "full")])
def test_lease_loses_no_more_than_the_reference_s(names: tuple[str, ...]):
    found, _ = compress(FAST, names, 0.4)
    expected, _ = compress(REFERENCE, names, 0.4)
    for ours, theirs in zip(found.allocations, expected.allocations, strict=True):
        assert ours.objective == pytest.approx(theirs.objective, rel=2e-3)
        assert ours.lower_bound == pytest.approx(theirs.lower_bound, rel=2e-3)


@pytest.mark.parametrize(
    ("names", "least"),
    [(("drop", "i4", "i8", "full"), 0), (("i4", "i8", "full"), 8)],  # 464 tokens, 60 to a page
)
def test_heads_hold_the_pages_of_their_own_budgets(names: tuple[str, ...], least: int):
    by_head = HeadBudgets(torch.tensor([[0.0, 5.0, 1.0], [0.1, 0.0, 0.4]]), 0.9)
    found, layout = compress(FAST, names, 0.4, by_head=by_head)
    blocks = found.pages.shape[0] // layout.pages_per_block
    expected = by_head.pages(layout.list_pages(blocks), least, 29)
    assert int(expected.min()) >= least
    assert int(expected.max()) > int(expected.min()) + 10
    capacity = torch.tensor([f.tokens_per_page for f in layout.formats.formats])
    pages = ((found.tokens + capacity - 1) // capacity).sum(-1)
    assert torch.equal(pages, expected)
    slow, _ = compress(SameLosses(), names, 0.4, by_head=by_head)
    assert torch.equal(found.tokens, slow.tokens)
    assert [a.objective for a in found.allocations] == pytest.approx(
        [a.objective for a in slow.allocations]
    )


def test_threads_change_no_byte(one_thread):
    names = ("i2", "i4", "i8", "full")
    torch.set_num_threads(4)
    many, _ = compress(FAST, names, 0.4)
    paper, _ = compress(FAST, names, 0.4, "paper")
    one_thread()
    assert torch.equal(compress(FAST, names, 0.4)[0].pages, many.pages)
    assert torch.equal(compress(FAST, names, 0.4, "paper")[0].pages, paper.pages)


@pytest.mark.skipif("MDKV_CPU_ISA" in os.environ, reason="already one of them")
@pytest.mark.parametrize("isa", cpu_isas()[1:])
@pytest.mark.slow
def test_other_instruction_sets(isa: str):
    tests = "test_round_trip or test_loss_sums or test_lease_of"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", tests],
        env=os.environ | {"MDKV_CPU_ISA": isa},
        check=True,
    )
