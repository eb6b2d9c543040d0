"""Every implementation of compression against its torch reference; Triton's is interpreted."""

from dataclasses import replace

import interpreter
import pytest
import torch
from compress_calls import InterpretedKernels

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.kernels import ReferenceKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.packing import unpack_list
from mdkv_vllm.core.prompt import Prompt
from mdkv_vllm.core.reference import mixed_decode
from mdkv_vllm.kernels.cpu.compress import CpuKernels
from mdkv_vllm.testing.lists import ChosenBefore, assert_nearly_the_same_lists
from mdkv_vllm.testing.paged import paged
from mdkv_vllm.testing.plans import whole_prompt

REFERENCE = ReferenceKernels()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module", params=["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def kernels(request):
    if request.param == "cpu":
        yield CpuKernels()
        return
    pytest.importorskip("triton")
    with interpreter.start() as process:
        yield InterpretedKernels(process)


def prompt_of(
    names, size, dtype=BF16, group=2, window=8, span=200, after=0, loss="hybrid", query_dtype=FP32,
    layers=2, heads=2, spread=1.0,
):  # fmt: skip
    """A random prompt in a paged cache, and its keys and values as they are."""
    geometry = PageGeometry(16, size, dtype)
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, layers, heads, 0)
    tokens = span + after + window
    falling = torch.linspace(2, 0.2, size)
    cache = (torch.randn(layers, 2, heads, tokens, size) * falling * spread**0.5).to(dtype)
    queries = (torch.randn(layers, heads * group, window, size) * spread**0.5).to(query_dtype)
    basis = None
    if formats.uses_basis:
        square = torch.randn(2, layers, heads, size, size)
        basis = Basis(*torch.linalg.qr(square)[0][..., : formats.basis_rank].contiguous())
    prompt = Prompt(layout, LOSSES[loss], size**-0.5, basis, paged(cache, 16), queries, span)
    return prompt, cache


def plain(prompt, cache):
    """The same prompt for the reference, in float32."""
    return replace(
        prompt, load=lambda i: tuple(cache[i].float().unbind()), queries=prompt.queries.float()
    )


def suited(kernels, prompt, cache):
    """The prompt as kernels take it: in pages, or layer by layer in float32."""
    return prompt if kernels.reads_pages else plain(prompt, cache)


def losses_of(kernels, prompt, layers):
    return torch.stack(list(kernels.layers(prompt, layers, prompt.bases(layers)).losses()))


def relative_errors(found, expected):
    """Per option, the worst head's."""
    expected = expected.double()
    off = (found.double() - expected).norm(dim=-1)
    return (off / expected.norm(dim=-1).clamp_min(1e-30)).amax((0, 2))


@pytest.mark.parametrize("loss", ["paper", "hybrid"])
@pytest.mark.parametrize(
    ("names", "size", "group", "window", "span", "after", "dtype", "query_dtype"),
    [
        (("drop", "i4", "i8", "full"), 64, 1, 1, 1, 0, BF16, BF16),
        (("i2", "i4", "i8", "full"), 80, 3, 7, 130, 9, FP16, FP16),
        (("drop", "r12", "r32i8"), 96, 4, 32, 65, 0, BF16, FP32),
        (("drop", "i4", "i8", "full"), 128, 8, 12, 64, 1, BF16, BF16),
        (("drop", "i8"), 256, 1, 16, 530, 33, BF16, BF16),  # more than one program's share
        (("drop", "full"), 64, 4, 5, 90, 700, BF16, BF16),
        (("drop", "i4", "r8", "full"), 64, 2, 8, 100, 0, FP32, FP32),
    ],
)
def test_losses(kernels, names, size, group, window, span, after, dtype, query_dtype, loss):
    torch.manual_seed(size + span)
    prompt, cache = prompt_of(names, size, dtype, group, window, span, after, loss, query_dtype)
    found = losses_of(kernels, suited(kernels, prompt, cache), range(2))
    expected = losses_of(REFERENCE, plain(prompt, cache), range(2))
    assert found.dtype == torch.float32
    assert found.shape == (2, len(names), 2, span)
    errors = dict(zip(names, relative_errors(found, expected).tolist(), strict=True))
    assert max(error for name, error in errors.items() if "i" not in name) < 2e-5
    # Another order of sums moves the scale or a code of few vectors, and so their loss a little; a
    # pooled loss passes that on to neighbours.
    assert max(errors.values()) < 1e-2
    moved = ((found - expected).abs() > 1e-2 * expected).float().mean((0, 2, 3))
    assert float(moved.max()) < (0.02 if loss == "paper" else 0.1)


@pytest.mark.parametrize("loss", ["solo", "pooled"])
def test_other_losses(kernels, loss):
    prompt, cache = prompt_of(("drop", "i4", "full"), 64, loss=loss)
    found = losses_of(kernels, suited(kernels, prompt, cache), range(2))
    expected = losses_of(REFERENCE, plain(prompt, cache), range(2))
    dropped, coded, kept = relative_errors(found, expected).tolist()
    assert max(dropped, kept) < 2e-5
    # GPUs find what codes do to a score in half precision.
    assert coded < (1e-3 if kernels.reads_pages else 2e-5)


def test_some_layers_of_many(kernels):
    prompt, cache = prompt_of(("drop", "r8", "i4"), 64, layers=5)
    taken = suited(kernels, prompt, cache)
    every = losses_of(kernels, taken, range(5))
    assert torch.equal(losses_of(kernels, taken, range(2, 4)), every[2:4])


@pytest.mark.parametrize("loss", ["paper", "solo"])
@pytest.mark.parametrize("spread", [100.0, 3000.0])
def test_losses_where_most_weights_underflow(kernels, loss, spread):
    torch.manual_seed(1)
    names = ("drop", "i8", "full")
    prompt, cache = prompt_of(names, 64, loss=loss, query_dtype=BF16, spread=spread)
    found = losses_of(kernels, suited(kernels, prompt, cache), range(2))
    expected = losses_of(REFERENCE, plain(prompt, cache), range(2))
    assert expected[:, 0].min() < 1e-45
    assert found.isfinite().all()
    scale = expected.amax(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(found / scale, expected / scale, rtol=2e-2, atol=2e-2)


def test_nan_is_not_hidden(kernels):
    prompt, cache = prompt_of(("drop", "full"), 64)
    cache[1, 0, 1, 5, 7] = torch.nan
    spoilt = suited(kernels, replace(prompt, load=paged(cache, 16)), cache)
    drop = losses_of(kernels, spoilt, range(2))[:, 0]
    assert drop[1, 1].isnan().all()
    assert drop[0].isfinite().all()


def chosen_for(kernels, prompt, choice):
    """Allocations of every layer, as the implementation makes them."""
    choice = choice.to(torch.int8) if kernels.reads_pages else choice
    formats = prompt.layout.formats.formats
    tokens = torch.stack([(choice == i).sum(-1) for i in range(len(formats))], -1)
    return [Allocation(c, t, 0.0, 0.0) for c, t in zip(choice, tokens, strict=True)]


@pytest.mark.parametrize(
    "names", [("drop", "r8", "r16", "full"), ("i2", "i4", "i8", "full"), ("drop", "r12i4", "r32i8")]
)
@pytest.mark.parametrize(
    ("size", "dtype", "loss"),
    [
        (64, BF16, "hybrid"), (80, FP16, "paper"), (96, BF16, "hybrid"), (128, FP16, "paper"),
        (256, BF16, "solo"),
    ],
)  # fmt: skip
def test_pack(kernels, names, size, dtype, loss):
    """Kernels that find scales of codes with the losses may pack by these."""
    torch.manual_seed(3)
    prompt, cache = prompt_of(names, size, dtype, span=201, loss=loss, layers=1, heads=3)
    formats, geometry, number = prompt.layout.formats, prompt.layout.geometry, len(names)
    drop = formats.drop
    choice = torch.randint(-1 if drop else 0, number - drop, (1, 3, 201))
    choice[0, 1] = 0  # empty lists, and one over several pages
    chosen = chosen_for(kernels, prompt, choice)
    found = torch.zeros(120, geometry.page_bytes, dtype=torch.uint8)
    found[:2] = 0xAB
    expected, layers = found.clone(), range(1)
    bases, first = prompt.bases(layers), torch.tensor(2)
    end = kernels.layers(suited(kernels, prompt, cache), layers, bases).pack(chosen, found, first)
    in_float = plain(prompt, cache)
    last = REFERENCE.layers(in_float, layers, bases).pack(chosen, expected, first)
    assert int(end) == int(last)
    assert (found[:2] == 0xAB).all()
    assert (found[int(end) :] == 0).all()
    assert_nearly_the_same_lists(found[2:], expected[2:], formats, choice[0], geometry)


def test_pack_of_a_float32_cache(kernels):
    """Last bits of elements are those of three products of TF32."""
    prompt, cache = prompt_of(("drop", "r12", "full"), 80, FP32, span=90, layers=1)
    formats, geometry = prompt.layout.formats.formats, prompt.layout.geometry
    choice = torch.randint(-1, 2, (1, 2, 90))
    chosen, bases = chosen_for(kernels, prompt, choice), prompt.bases(range(1))
    found, expected = torch.zeros(2, 40, geometry.page_bytes, dtype=torch.uint8)
    kernels.layers(suited(kernels, prompt, cache), range(1), bases).pack(
        chosen, found, torch.tensor(0)
    )
    in_float = plain(prompt, cache)
    REFERENCE.layers(in_float, range(1), bases).pack(chosen, expected, torch.tensor(0))
    first = 0
    for head in range(2):
        for index, fmt in enumerate(formats):
            count = int((choice[0, head] == index).sum())
            own = slice(first, first + fmt.pages(count))
            first = own.stop
            both = (unpack_list(x[own], count, fmt, geometry) for x in (found, expected))
            for ours, theirs in zip(*both, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def decoded(result, layout, segment, queries, basis):
    """Attention over the lease alone, read from a cache in which its blocks are shuffled."""
    geometry, blocks = layout.geometry, segment.num_lease_blocks
    shape = layout.pages_per_block, geometry.block_size, 2 * geometry.head_size
    kv_cache = torch.full((blocks + 3, *shape), torch.nan, dtype=geometry.dtype)
    places = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(1))[:blocks]
    kv_cache[places] = result.pages.view(geometry.dtype).view(blocks, *shape)
    return [
        mixed_decode(
            query.double(),
            kv_cache,
            layer,
            layout,
            places.int().unsqueeze(0),
            torch.zeros(len(query), dtype=torch.int32),
            torch.full((len(query),), blocks * geometry.block_size, dtype=torch.int32),
            torch.tensor([[[0, blocks]]], dtype=torch.int32),
            basis,
            0.125,
        )[0]
        for layer, query in enumerate(queries)
    ]


BY_HEAD = HeadBudgets(torch.tensor([[0.1, 5.0], [0.1, 0.4], [2.0, 0.5]]), 0.7)


@pytest.mark.parametrize(
    ("names", "by_head", "most", "own_basis"),
    [
        # So few pages leave a finish that is not exhaustive well behind.
        (("drop", "i4", "i8", "full"), None, 1.3, False),
        (("drop", "i8", "full"), BY_HEAD, 1.1, False),
        (("drop", "r8", "r16i8", "full"), None, 1.3, True),
        (("drop", "r8", "r16i8", "full"), None, 1.3, False),
    ],
)
def test_a_whole_prompt(kernels, names, by_head, most, own_basis):
    """Every part in its place, in two groups of layers; the reference's bytes for its choice."""
    geometry, layers, heads, window = PageGeometry(16, 64, BF16), 3, 2, 8
    formats = parse_formats(names, geometry)
    rank = formats.basis_rank
    layout = LeaseLayout(geometry, formats, layers, heads, rank if own_basis else 0)
    segment = whole_prompt(300, 16, window, 0.4, layout.min_blocks)
    cache = (torch.randn(layers, 2, heads, 300, 64) * torch.linspace(2, 0.2, 64)).to(BF16)
    queries = torch.randn(layers, heads * 2, window, 64)
    basis = None
    if rank and not own_basis:
        square = torch.randn(2, layers, heads, 64, 64)
        basis = Basis(*torch.linalg.qr(square)[0][..., :rank].contiguous())

    def compress(which, load):
        compressor = Compressor(layout, LOSSES["hybrid"], 0.125, basis, by_head, which)
        return compressor.compress(load, queries, segment, True)

    def in_float(layer):
        return cache[layer].float().unbind()

    found = compress(kernels, paged(cache, 16) if kernels.reads_pages else in_float)
    best = compress(CpuKernels(), in_float)
    for ours, theirs in zip(found.allocations, best.allocations, strict=True):
        assert float(ours.objective) <= theirs.objective * most
        assert float(ours.lower_bound) == pytest.approx(theirs.lower_bound, rel=0.02)
    expected = compress(ChosenBefore(found.allocations), in_float)
    lists = layout.lists_first_page
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pages[:lists], expected.pages[:lists])
    choice = torch.cat([a.choice for a in found.allocations])
    assert_nearly_the_same_lists(
        found.pages[lists:], expected.pages[lists:], formats, choice, geometry
    )
    assert int(formats.pages(found.tokens).sum()) <= layout.list_pages(segment.num_lease_blocks)
    query = torch.randn(layers, 5, heads * 2, 64)
    both = (decoded(result, layout, segment, query, basis) for result in (found, expected))
    for ours, theirs in zip(*both, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
