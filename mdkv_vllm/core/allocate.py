"""Which format each token gets: Lagrangian allocation with a page-exact finish.

Per layer, over heads and tokens: minimise ``sum L_t(f_t)`` subject to the layer's pages
(MixedDimKV equations 1 to 3). Pages are what is freed, so every list must have whole
pages and their sum is the budget; KV-Compress (arXiv 2410.00161) does this for one format.

The Lagrangian solution says roughly how many pages each list wants. Around it, every choice of
whole pages per (head, format) in a small box is filled with the tokens that suit it best
(:mod:`mdkv_vllm.core.exchange`), which gives each head a table of its least loss by pages
taken; a knapsack over those tables hands out the pages. The result is optimal within the box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mdkv_vllm.core.exchange import Exchange
from mdkv_vllm.core.formats import FormatSet

_BISECTIONS = 40
_BOX_POINTS = 128
"""Most choices of pages tried per head."""


@dataclass(frozen=True)
class Allocation:
    """The formats chosen for one layer.

    Attributes:
        choice: int64 ``[kv_heads, span]``, index into ``formats.formats``, or -1 for drop.
        tokens: int64 ``[kv_heads, formats]``, tokens of each list.
        objective: summed loss.
        lower_bound: value of the Lagrangian dual, which no allocation of that many bytes,
            page-exact or not, can beat.
    """

    choice: torch.Tensor
    tokens: torch.Tensor
    objective: float
    lower_bound: float


def allocate(losses: torch.Tensor, formats: FormatSet, num_pages: int) -> Allocation:
    """Choose a format for every token of a layer within exactly ``num_pages`` pages.

    Fewer pages are taken only where more would not lower the loss.

    Args:
        losses: float32 ``[options, kv_heads, span]``; options in the order of
            ``formats.names``.
        formats: the formats allowed.
        num_pages: pages the layer's lists may take together.

    Raises:
        ValueError: nothing may be dropped and the cheapest format does not fit.
    """
    _, heads, span = losses.shape
    if not formats.drop and heads * formats.cheapest.pages(span) > num_pages:
        raise ValueError(f"{num_pages} pages cannot hold {span} tokens without dropping any")
    losses = losses.double()
    # Option 0, to drop or the cheapest format, takes the tokens that the others leave.
    capacity = [0] * formats.drop + [f.tokens_per_page for f in formats.formats]
    option, wanted, lower_bound = _lagrangian(losses, capacity, num_pages)
    fillings = [Exchange(losses[:, head], option[head]) for head in range(heads)]
    box = _Box(capacity, span)
    corners = [
        [w // c - box.below for w, c in zip(row[1:], capacity[1:], strict=True)] for row in wanted
    ]
    while True:
        corners = [[max(pages, 0) for pages in corner] for corner in corners]
        tables = [box.table(f, corner) for f, corner in zip(fillings, corners, strict=True)]
        if best := _share_pages(tables, num_pages):
            break
        corners = [[pages - 1 for pages in corner] for corner in corners]
    for filling, counts in zip(fillings, best, strict=True):
        filling.move_to(counts)
    option = torch.tensor([f.option for f in fillings])
    objective = float(losses.gather(0, option.unsqueeze(0)).sum())
    tokens = torch.tensor([f.counts for f in fillings])[:, int(formats.drop) :]
    return Allocation(option - int(formats.drop), tokens, objective, lower_bound)


def allocate_layers(
    allocate_pool: Callable[[torch.Tensor, FormatSet, int], Allocation],
    losses: Sequence[torch.Tensor],
    formats: FormatSet,
    budgets: Sequence[Sequence[int]],
) -> list[Allocation]:
    """Choose formats for several layers, one pool of pages after the other.

    Args:
        allocate_pool: as :func:`allocate`.
        losses: per layer, ``[options, kv_heads, span]``.
        formats: the formats allowed.
        budgets: per layer, the pages of each of its pools; its heads are divided evenly among
            them, in order.
    """
    layers = []
    for layer, pages in zip(losses, budgets, strict=True):
        pools = zip(layer.chunk(len(pages), dim=1), pages, strict=True)
        parts = [allocate_pool(part, formats, budget) for part, budget in pools]
        layers.append(
            Allocation(
                torch.cat([part.choice for part in parts]),
                torch.cat([part.tokens for part in parts]),
                sum(part.objective for part in parts),
                sum(part.lower_bound for part in parts),
            )
        )
    return layers


def _lagrangian(
    losses: torch.Tensor, capacity: Sequence[int], num_pages: int
) -> tuple[torch.Tensor, list[list[int]], float]:
    """Solve the problem in which a token may take any share of a page.

    Args:
        losses: float64 ``[options, kv_heads, span]``.
        capacity: tokens per page of each option; 0 for drop.
        num_pages: pages to be had.

    Returns:
        Option of each token at the least price that asks for no more pages than there
        are, int64 ``[kv_heads, span]``; tokens wanted per head and option when the pages left
        at that price are given to tokens that would take them at any lower one; and the
        dual's value.
    """
    costs = torch.tensor([1.0 / c if c else 0.0 for c in capacity], dtype=torch.float64)
    low, high = _bisect_price(losses, costs, num_pages)
    least, option = _cheapest(losses, costs, high)
    lower_bound = float(least.sum()) - high * num_pages
    richer = _cheapest(losses, costs, low)[1]
    more = (costs[richer] - costs[option]).flatten().cumsum(0)
    affordable = (more <= num_pages - _pages_asked(option, costs)).view_as(option)
    mixed = torch.where(affordable, richer, option)
    wanted = [row.bincount(minlength=len(costs)).tolist() for row in mixed]
    return option, wanted, lower_bound


def _bisect_price(losses: torch.Tensor, costs: torch.Tensor, num_pages: int) -> tuple[float, float]:
    """Prices per page next to each other; only at the second do the pages suffice."""
    if _pages_asked(_cheapest(losses, costs, 0.0)[1], costs) <= num_pages:
        return 0.0, 0.0
    high = float(losses.max()) / float(costs[costs > 0].min()) + 1e-30
    low = high * 1e-12
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if _pages_asked(_cheapest(losses, costs, middle)[1], costs) > num_pages:
            low = middle
        else:
            high = middle
    return low, high


def _cheapest(
    losses: torch.Tensor, costs: torch.Tensor, price: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least priced loss of each token and its option, the first among equals."""
    least = losses[0] + price * costs[0]
    option = torch.zeros(least.shape, dtype=torch.int64)
    for index in range(1, len(costs)):
        priced = losses[index] + price * costs[index]
        option.masked_fill_(priced < least, index)
        least = torch.minimum(least, priced)
    return least, option


def _pages_asked(option: torch.Tensor, costs: torch.Tensor) -> float:
    counts = option.flatten().bincount(minlength=len(costs)).tolist()
    return sum(n * cost for n, cost in zip(counts, costs.tolist(), strict=True))


class _Box:
    """The choices of whole pages tried around a head's Lagrangian solution."""

    def __init__(self, capacity: Sequence[int], span: int) -> None:
        self._capacity, self._span = capacity, span
        lists = len(capacity) - 1
        width = next((w for w in (4, 3) if w**lists <= _BOX_POINTS), 2)
        self.below = 1 if width > 2 else 0
        """Pages by which the box starts below what a list wants, rounded down."""
        varied = min(lists, int(math.log(_BOX_POINTS, width)))
        self._widths = [1] * (lists - varied) + [width] * varied

    def table(self, filling: Exchange, corner: Sequence[int]) -> dict[int, tuple[float, list[int]]]:
        """Least loss, and tokens per option, by the number of pages a head takes.

        Args:
            filling: the head's tokens; left wherever the search ends.
            corner: least pages of each list in the box.
        """
        table: dict[int, tuple[float, list[int]]] = {}
        for step in _snake(self._widths):
            counts = self._counts([low + s for low, s in zip(corner, step, strict=True)])
            filling.move_to(counts)
            pages = sum(-(-n // c) for n, c in zip(counts, self._capacity, strict=True) if c)
            if pages not in table or filling.objective < table[pages][0]:
                table[pages] = filling.objective, counts
        return table

    def _counts(self, pages: Sequence[int]) -> list[int]:
        """Tokens per option when lists are filled up, the richest first."""
        counts, rest = [], self._span
        for list_pages, capacity in zip(reversed(pages), reversed(self._capacity), strict=False):
            counts.append(min(list_pages * capacity, rest))
            rest -= counts[-1]
        return [rest, *reversed(counts)]


def _snake(widths: Sequence[int]) -> Iterator[list[int]]:
    """Every point of a box, each one step from the last, the last axis moving most."""
    at, way = [0] * len(widths), [1] * len(widths)
    while True:
        yield at
        for axis in reversed(range(len(widths))):
            if 0 <= at[axis] + way[axis] < widths[axis]:
                at[axis] += way[axis]
                break
            way[axis] = -way[axis]
        else:
            return


def _share_pages(
    tables: Sequence[dict[int, tuple[float, list[int]]]], num_pages: int
) -> list[list[int]] | None:
    """Tokens per head and option with the least summed loss; None where no choice fits.

    Equal losses go to the choice of more pages.
    """
    shares: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
    for table in tables:
        grown: dict[int, tuple[float, list[list[int]]]] = {}
        for taken, (loss, chosen) in sorted(shares.items()):
            for pages, (added, counts) in sorted(table.items()):
                total, summed = taken + pages, loss + added
                if total <= num_pages and (total not in grown or summed < grown[total][0]):
                    grown[total] = summed, [*chosen, counts]
        shares = grown
    if not shares:
        return None
    return min(sorted(shares.items(), reverse=True), key=lambda item: item[1][0])[1][1]
