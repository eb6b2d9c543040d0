"""Where a decode kernel goes wrong first: each format by itself, with ever more tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mdkv_vllm.testing import leases
from mdkv_vllm.testing.leases import Model, Request

from .call import Kernel
from .device import device
from .trial import LSE_TOLERANCE, TOLERANCE, Trial

TAIL = "tail"
PAGES = 2
"""Whole pages that a list has at most; then one token more."""
LEASES = 3
"""Of a request at most."""
QUERIES = 64
"""Of a call."""


@dataclass(frozen=True)
class Place:
    """Where a format is wrong first.

    Attributes:
        name: the format, or :data:`TAIL`.
        tokens: the fewest in a list at which a result is wrong; 0 where none is.
        text: in words.
    """

    name: str
    tokens: int
    text: str


class OneList(leases.Case):
    """Requests whose only list has a given number of tokens in every lease, head and layer.

    Args:
        model: with a single format.
        tokens: of each request's lists.
        seed: of the numbers.
    """

    def __init__(self, model: Model, tokens: Sequence[int], seed: int) -> None:
        layout, count = model.layout(), min(model.max_leases, LEASES)
        self._next = iter([n for n in tokens for _ in range(count)])
        pages = [layout.formats.pages(torch.tensor([n])).item() for n in tokens]
        heads = layout.pages_per_block
        blocks = [-(-(layout.lists_first_page + int(p) * heads) // heads) for p in pages]
        super().__init__(model, [Request((b,) * count, 0) for b in blocks], seed)

    def draw_tokens(self, lease_blocks: int, fill: float) -> torch.Tensor:
        """See :class:`leases.Case`."""
        return torch.full(self.layout.table_shape[:3], next(self._next))


def locate(model: Model, name: str, seed: int, kernel: Kernel) -> Place:
    """Find the fewest tokens of a format, or of the tail, that give a wrong result.

    Args:
        model: whose sizes are taken.
        name: one of its formats, or :data:`TAIL`.
        seed: of the numbers.
        kernel: under test.
    """
    if name == TAIL:
        alone, per_page = replace(model, names=("full",)), model.block_size
    else:
        rank = model.prompt_basis_rank
        alone = replace(model, names=(name,), prompt_basis_rank=rank if name[0] == "r" else 0)
        per_page = alone.layout().formats.formats[0].tokens_per_page
    counts = list(range(1, PAGES * per_page + 2))
    for start in range(0, len(counts), QUERIES):
        some = counts[start : start + QUERIES]
        if name == TAIL:
            case = leases.Case(alone, [Request(0, n) for n in some], seed)
        else:
            case = OneList(alone, some, seed)
        wrong = _first_wrong(case, some, kernel)
        if wrong is not None:
            index, where = wrong
            page, slot = divmod(some[index] - 1, per_page)
            text = (
                f"{name}: wrong first with {some[index]} tokens (page {page}, slot {slot}), {where}"
            )
            return Place(name, some[index], text)
    return Place(name, 0, f"{name} alone: right with 1 to {counts[-1]} tokens")


def _first_wrong(
    case: leases.Case, counts: Sequence[int], kernel: Kernel
) -> tuple[int, str] | None:
    """Number of the first request with a wrong result, and what of it is wrong."""
    trial = Trial(case, len(counts), device().where, kernel)
    trial.load(range(len(counts)), case.totals)
    trial.launch()
    expected, expected_lse = trial.expected()
    off = trial.output.double() - expected
    error = (off.norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(torch.inf)
    lse_error = (trial.lse.double() - expected_lse).abs().nan_to_num(torch.inf)
    bad = (error > TOLERANCE[case.model.dtype]) | (lse_error > LSE_TOLERANCE)
    if not bad.any():
        return None
    query, head = divmod(int(bad.flatten().int().argmax()), bad.shape[1])
    limit = TOLERANCE[case.model.dtype] * expected[query, head].abs().max()
    dims = (off[query, head].abs().nan_to_num(torch.inf) > limit).nonzero().flatten().tolist()
    spread = f"dimensions {dims[0]} to {dims[-1]} ({len(dims)})" if dims else "no dimension by much"
    told = (float(error[query, head]), float(lse_error[query, head]))
    return query, f"head {head}, {spread}, error {told[0]:.1e}, lse off by {told[1]:.1e}"
