"""Allocation on the device against the reference: pages exact, losses near, pools independent."""

import interpreter
import pytest
import torch
from compress_calls import InterpretedKernels

from mdkv_vllm.core.allocate import allocate as reference
from mdkv_vllm.core.formats import PageGeometry, parse_formats

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

GEOMETRY = PageGeometry(16, 128, torch.bfloat16)
DROP, KEEP = ("drop", "i4", "i8", "full"), ("i2", "i4", "i8", "full")
RANKS = ("drop", "r8", "r16", "r32", "i4", "i8", "full")


def heavy_tailed(options, heads, span):
    scale = torch.rand(1, heads, span).pow(8) * 10 + 1e-4
    losses = scale * torch.rand(options, heads, span).sort(0, descending=True).values
    losses[-1] = 0
    return losses


def budget_of(formats, heads, span, fraction):
    least = 0 if formats.drop else heads * formats.formats[0].pages(span)
    most = heads * formats.formats[-1].pages(span)
    return least + round(fraction * (most - least))


@pytest.fixture(scope="module")
def kernels():
    with interpreter.start() as process:
        yield InterpretedKernels(process)


def check(kernels, losses, formats, num_pages, clearings=4):
    """Every invariant of an allocation."""
    (found,) = kernels.allocate([losses], formats, [[num_pages]], clearings=clearings)
    choice = found.choice
    assert choice.dtype == torch.int8
    assert int(choice.min()) >= (-1 if formats.drop else 0)
    tokens = torch.stack([(choice == i).sum(1) for i in range(len(formats.formats))], 1)
    assert torch.equal(found.tokens, tokens)
    pages = sum(
        f.pages(int(n)) for row in tokens for f, n in zip(formats.formats, row, strict=True)
    )
    assert pages <= num_pages
    option = (choice + int(formats.drop)).long().unsqueeze(0)
    assert float(found.objective) == pytest.approx(float(losses.double().gather(0, option).sum()))
    assert float(found.lower_bound) <= float(found.objective) * (1 + 1e-9) + 1e-9
    return found, pages


@pytest.mark.parametrize("names", [DROP, KEEP, RANKS, ("drop", "full"), ("i4",), ("r8", "r12")])
@pytest.mark.parametrize(("heads", "span"), [(1, 1), (2, 130)])
def test_pages_are_exact(kernels, names, heads, span):
    formats = parse_formats(names, GEOMETRY)
    losses = heavy_tailed(len(formats.names), heads, span)
    ties = (losses * 8).round() / 8
    for some, fractions in ((losses, (0.0, 0.3, 1.5)), (ties, (0.03, 0.7))):
        for fraction in fractions:
            pages = budget_of(formats, heads, span, fraction)
            check(kernels, some, formats, pages, clearings=1)


@pytest.mark.parametrize(
    ("names", "fraction", "most"),
    [
        (DROP, 0.0625, 0.02),
        (DROP, 0.25, 0.02),
        (DROP, 0.5, 0.02),
        (KEEP, 0.1, 0.15),
        (KEEP, 0.4, 0.15),
        (("drop", "i4"), 0.3, 1e-6),
    ],
)
def test_loses_little_to_the_reference(kernels, names, fraction, most):
    formats, heads, span = parse_formats(names, GEOMETRY), 3, 1000
    losses = heavy_tailed(len(formats.names), heads, span)
    num_pages = budget_of(formats, heads, span, fraction)
    found, pages = check(kernels, losses, formats, num_pages)
    expected = reference(losses, formats, num_pages)
    assert pages == num_pages
    assert float(found.objective) <= expected.objective * (1 + most)
    assert float(found.lower_bound) <= expected.lower_bound + 1e-9


def test_all_is_kept_where_pages_suffice(kernels):
    formats = parse_formats(DROP, GEOMETRY)
    losses = heavy_tailed(4, 2, 100)
    found, _ = check(kernels, losses, formats, 100)
    assert (found.choice == 2).all()


def test_same_losses_same_choice(kernels):
    formats = parse_formats(KEEP, GEOMETRY)
    losses = heavy_tailed(4, 3, 500).half()
    first, again = (kernels.allocate([losses], formats, [[60]])[0] for _ in range(2))
    assert torch.equal(first.choice, again.choice)


@pytest.mark.parametrize("names", [DROP, KEEP])
@pytest.mark.parametrize("parts", [1, 2])
def test_pools_know_nothing_of_each_other(kernels, names, parts):
    """Several layers in one call, each with one pool or one for every head, of unequal budgets."""
    formats, heads, span = parse_formats(names, GEOMETRY), 2, 120
    losses = [heavy_tailed(len(formats.names), heads, span) * 10.0**i for i in range(3)]
    budgets = [
        [budget_of(formats, heads // parts, span, fraction / (1 + part)) for part in range(parts)]
        for fraction in (0.1, 0.9, 0.4)
    ]
    together = kernels.allocate(losses, formats, budgets, clearings=2)
    assert len({tuple(row) for layer in together for row in layer.tokens.tolist()}) >= 3
    for layer, pools, found in zip(losses, budgets, together, strict=True):
        alone = [
            kernels.allocate([part], formats, [[pages]], clearings=2)[0]
            for part, pages in zip(layer.chunk(parts, 1), pools, strict=True)
        ]
        assert torch.equal(found.choice, torch.cat([one.choice for one in alone]))
        assert torch.equal(found.tokens, torch.cat([one.tokens for one in alone]))
        assert float(found.objective) == pytest.approx(sum(float(one.objective) for one in alone))
        assert float(found.lower_bound) == pytest.approx(
            sum(float(one.lower_bound) for one in alone)
        )
        pages = formats.pages(found.tokens).view(parts, -1).sum(1)
        assert (pages <= torch.tensor(pools)).all()


def test_earlier_tokens_come_first_among_equals(kernels):
    formats = parse_formats(("drop", "full"), GEOMETRY)
    losses = torch.stack((torch.ones(1, 600), torch.zeros(1, 600)))
    (found,) = kernels.allocate([losses], formats, [[3]])
    assert torch.equal(found.choice[0], torch.where(torch.arange(600) < 48, 0, -1))


def test_too_few_pages_are_refused():
    from mdkv_vllm.kernels.triton.allocate import allocate

    formats = parse_formats(KEEP, GEOMETRY)
    enough = [formats.formats[0].pages(200)] * 3
    with pytest.raises(ValueError, match="1 pages cannot hold 200 tokens of 1 heads"):
        allocate([torch.rand(4, 3, 200)] * 2, formats, [enough, [*enough[:2], 1]])
