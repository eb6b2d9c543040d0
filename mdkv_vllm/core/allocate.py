"""Which format each token gets: Lagrangian allocation with a page-exact finish.

Per layer, over heads and tokens: minimise ``sum L_t(f_t)`` subject to the layer's pages
(MixedDimKV equations 1 to 3). Pages are what is freed, so the Lagrangian solution is
then fitted to whole pages per (head, format) list whose sum is the budget
exactly; KV-Compress (arXiv 2410.00161) does this for one format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.formats import FormatSet

_BISECTIONS = 40


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

    Args:
        losses: float32 ``[options, kv_heads, span]``; options in the order of
            ``formats.names``.
        formats: the formats allowed.
        num_pages: pages the layer's lists may take together.

    Raises:
        ValueError: nothing may be dropped and the cheapest format does not fit.
    """
    _, heads, span = losses.shape
    capacity = torch.tensor([f.tokens_per_page for f in formats.formats])
    if not formats.drop and heads * formats.formats[0].pages(span) > num_pages:
        raise ValueError(f"{num_pages} pages cannot hold {span} tokens without dropping any")
    costs = 1.0 / capacity.float()
    if formats.drop:
        costs = torch.cat((torch.zeros(1), costs))
    price = _bisect_price(losses, costs, num_pages)
    priced = losses + price * costs[:, None, None]
    cheapest, option = priced.min(0)
    lower_bound = float(cheapest.double().sum()) - price * num_pages
    wanted = torch.stack([(option == o).sum(1) for o in range(len(costs))], 1)
    wanted = wanted[:, int(formats.drop) :]
    pages = _whole_pages(wanted, capacity, span, num_pages, formats.drop)
    option = _fill(losses, priced, pages * capacity)
    objective = float(losses.gather(0, option.unsqueeze(0)).double().sum())
    choice = option - int(formats.drop)
    tokens = torch.stack([(choice == f).sum(1) for f in range(len(capacity))], 1)
    return Allocation(choice, tokens, objective, lower_bound)


def _bisect_price(losses: torch.Tensor, costs: torch.Tensor, num_pages: int) -> float:
    """Smallest price per page at which tokens, each on its own, ask for no more than there is."""

    def pages_asked(price: float) -> float:
        option = (losses + price * costs[:, None, None]).argmin(0)
        return float((option.flatten().bincount(minlength=len(costs)) * costs.double()).sum())

    if pages_asked(0.0) <= num_pages:
        return 0.0
    high = float(losses.max()) / float(costs[costs > 0].min()) + 1e-30
    low = high * 1e-12
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if pages_asked(middle) > num_pages:
            low = middle
        else:
            high = middle
    return high


def _whole_pages(
    wanted: torch.Tensor, capacity: torch.Tensor, span: int, num_pages: int, drop: bool
) -> torch.Tensor:
    """Round the tokens wanted per list to whole pages that sum to ``num_pages``.

    Lists grow a page at a time in the order of what they lack; the last step at which the
    sum still fits is taken. Where nothing may be dropped, the cheapest list of
    each head is not grown but takes what the others leave.

    Args:
        wanted: int64 ``[kv_heads, formats]`` tokens.
        capacity: int64 ``[formats]`` tokens per page.
        span: tokens per head.
        num_pages: pages to hand out.
        drop: whether tokens may be dropped.

    Returns:
        int64 ``[kv_heads, formats]`` pages.
    """
    heads, first = wanted.shape[0], 0 if drop else 1
    ideal = (wanted / capacity)[:, first:]
    base = (ideal.floor() - 1).clamp_min_(0).long()
    steps = torch.arange(4)
    lack = (ideal - base).unsqueeze(-1) - steps
    order = lack.flatten().argsort(descending=True, stable=True) // len(steps)
    grown = torch.nn.functional.one_hot(order, base.numel()).cumsum(0)
    grown = torch.cat((torch.zeros(1, base.numel(), dtype=torch.int64), grown))
    pages = base.flatten() + grown
    pages = pages.view(len(pages), heads, -1)
    if not drop:
        rest = (span - (pages * capacity[1:]).sum(-1)).clamp_min_(0)
        pages = torch.cat(((rest + capacity[0] - 1).div(capacity[0], rounding_mode="floor")[..., None], pages), -1)
    fits = (pages.sum((1, 2)) <= num_pages).nonzero()
    if len(fits) == 0:
        pages = torch.zeros(heads, len(capacity), dtype=torch.int64)
        if not drop:
            pages[:, 0] = -(-span // int(capacity[0]))
        return pages
    return pages[fits[-1, 0]]


def _fill(losses: torch.Tensor, priced: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Give each list's room to the tokens that gain most by it, richest format first.

    Args:
        losses: float32 ``[options, kv_heads, span]``.
        priced: losses plus the price of each option.
        room: int64 ``[kv_heads, formats]`` tokens each list can hold.

    Returns:
        int64 ``[kv_heads, span]`` option of each token.
    """
    options, _, span = losses.shape
    skipped = options - room.shape[1]
    option = torch.zeros(losses.shape[1:], dtype=torch.int64)
    free = torch.ones_like(option, dtype=torch.bool)
    rank = torch.arange(span)
    for candidate in range(options - 1, 0, -1):
        gain = priced[:candidate].amin(0) - priced[candidate]
        order = gain.masked_fill_(~free, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        list_room = room[:, candidate - skipped].clamp_max(free.sum(-1))
        chosen = torch.zeros_like(free).scatter_(1, order, rank < list_room[:, None])
        option[chosen] = candidate
        free &= ~chosen
    return option
