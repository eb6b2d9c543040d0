"""Allocation on the device against the reference: pages exact, losses near, nothing waited for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdkv_vllm.core.allocate import allocate as reference
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.triton_kernels.allocate import allocate

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


def check(losses, formats, num_pages):
    """Every invariant of an allocation."""
    found = allocate(losses, formats, num_pages)
    choice = found.choice
    assert choice.dtype == torch.int64
    assert int(choice.min()) >= (-1 if formats.drop else 0)
    tokens = torch.stack([(choice == i).sum(1) for i in range(len(formats.formats))], 1)
    assert torch.equal(found.tokens, tokens)
    pages = sum(
        f.pages(int(n)) for row in tokens for f, n in zip(formats.formats, row, strict=True)
    )
    assert pages <= num_pages
    option = (choice + int(formats.drop)).unsqueeze(0)
    assert float(found.objective) == pytest.approx(float(losses.double().gather(0, option).sum()))
    assert float(found.lower_bound) <= float(found.objective) * (1 + 1e-9) + 1e-9
    return found, pages


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("names", [DROP, KEEP, RANKS, ("drop", "full"), ("i4",), ("r8", "r12")])
@pytest.mark.parametrize(("heads", "span"), [(1, 1), (3, 37), (2, 250)])
def test_pages_are_exact(names, heads, span, ties):
    formats = parse_formats(names, GEOMETRY)
    losses = heavy_tailed(len(formats.names), heads, span)
    if ties:
        losses = (losses * 8).round() / 8
    for fraction in (0.0, 0.03, 0.3, 0.7, 1.0, 1.5):
        check(losses, formats, budget_of(formats, heads, span, fraction))


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
def test_loses_little_to_the_reference(names, fraction, most):
    formats, heads, span = parse_formats(names, GEOMETRY), 4, 1000
    losses = heavy_tailed(len(formats.names), heads, span)
    num_pages = budget_of(formats, heads, span, fraction)
    found, pages = check(losses, formats, num_pages)
    expected = reference(losses, formats, num_pages)
    assert pages == num_pages
    assert float(found.objective) <= expected.objective * (1 + most)
    assert float(found.lower_bound) <= expected.lower_bound + 1e-9


def test_all_is_kept_where_pages_suffice():
    formats = parse_formats(DROP, GEOMETRY)
    losses = heavy_tailed(4, 2, 100)
    found, _ = check(losses, formats, 100)
    assert (found.choice == 2).all()


def test_same_losses_same_choice():
    formats = parse_formats(KEEP, GEOMETRY)
    losses = heavy_tailed(4, 3, 500).half()
    first, again = (allocate(losses, formats, 60) for _ in range(2))
    assert torch.equal(first.choice, again.choice)


def test_too_few_pages_are_refused():
    formats = parse_formats(KEEP, GEOMETRY)
    with pytest.raises(ValueError, match="cannot hold"):
        allocate(torch.rand(4, 3, 200), formats, 5)


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or copies to it unasked."""

    REFUSED = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "item")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, name
        if name.startswith("index"):
            given = [x for x in args[1] if x is not None] if isinstance(args[1], list) else []
            assert all(x.dtype != torch.bool for x in given), "a mask has a size to wait for"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("names", [DROP, KEEP])
def test_nothing_waits_for_the_device(names):
    pytest.importorskip("triton")
    from mdkv_vllm.triton_kernels.pack import list_table

    formats = parse_formats(names, GEOMETRY)
    losses = heavy_tailed(4, 2, 300)
    with NoSynchronisation():
        found = allocate(losses, formats, 40)
        list_table(found.choice, formats, torch.zeros((), dtype=torch.int64))
