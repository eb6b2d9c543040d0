"""Allocation on the device: what :mod:`mdkv_vllm.core.allocate` does, without waiting for a result.

The price of a page is found by bisection, sixteen prices at a time. Around that solution every list
is given whole pages, those that cost least first, as many as there are; the total is
exact by construction. Then every list gets a price of its own at which as many tokens want it
as it has room for, found one list after the other (an assignment's dual, by coordinates), and
takes those that gain most. The reference searches more choices of pages and assigns tokens
optimally; the tests measure how far behind this stays.

All pools of pages are solved at once, with as many launches for many layers as for one. What is
done per token are the kernels of :mod:`mdkv_vllm.triton_kernels.allocate_kernels`; what is left are
numbers per pool, head and list. Memory per token, head and layer: the losses once more in one
piece (4 bytes per option), gains (4), options (1), choices (8), and 12 at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.formats import FormatSet

from . import allocate_kernels as kernels

_ROUNDS = 7
"""Searches among ``PRICES`` prices, after which two neighbours are one float32 apart."""

_PRICE_RANGE = 1e-12
"""Where the search starts, below the highest price that any token could pay."""

_PAGES_BELOW, _PAGES_ABOVE = 1, 2
"""Pages of a list that are open to choice, around what it wants rounded down."""

_CLEARINGS = 8
"""Rounds in which every list's price is set anew."""


def allocate(
    losses: Sequence[torch.Tensor], formats: FormatSet, budgets: Sequence[Sequence[int]]
) -> list[Allocation]:
    """Choose a format for every token of some layers, each pool within its pages.

    A pool's result does not depend on what else is in the call.

    Args:
        losses: per layer, ``[options, kv_heads, span]`` of any float type, of which float32 is
            used; options in the order of ``formats.names``.
        formats: the formats allowed.
        budgets: per layer, the pages of each of its pools, as many pools in every layer; its
            heads are divided evenly among them, in order.

    Returns:
        Per layer as the reference; objective and bound are float64 tensors of one element. The
        bound is the dual's value at the price found, a little below its best where nothing may be
        dropped.

    Raises:
        ValueError: nothing may be dropped and the cheapest format does not fit.
    """
    together = (
        losses
        if isinstance(losses, torch.Tensor)
        else torch.stack([layer.float() for layer in losses])
    )
    pages = [budget for pools in budgets for budget in pools]
    pools = _Pools(together, formats, pages)
    price, wanted, bound = pools.lagrangian()
    room = pools.whole_pages(price, wanted)
    option = pools.assign(price, room).view(len(losses), *losses[0].shape[1:])
    objective = together.gather(1, option.long().unsqueeze(1)).sum((1, 2, 3), dtype=torch.float64)
    tokens = torch.stack([(option == i).sum(-1) for i in range(formats.drop, pools.options)], -1)
    choice = option - int(formats.drop)
    bounds = bound.view(len(losses), -1).sum(1)
    return [Allocation(*layer) for layer in zip(choice, tokens, objective, bounds, strict=True)]


@cache
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is copied to the device once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def _on_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 ``[numbers]``, copied without waiting."""
    host = torch.tensor(numbers, dtype=torch.int64)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class _Pools:
    """Pools of pages, each for some rows (KV heads of a layer).

    Attributes:
        losses: float32 ``[layers, options, kv_heads, span]``.
        capacity: tokens per page of each option, 0 for dropping. Option 0 takes the tokens that
            the others leave.
        costs: pages per token of each option, float64 ``[options]``.
        pages: of each pool, int64 ``[pools]``.
    """

    def __init__(self, losses: torch.Tensor, formats: FormatSet, pages: Sequence[int]) -> None:
        layers, self.options, self.heads, self.span = losses.shape
        self.rows, self.per_pool = layers * self.heads, layers * self.heads // len(pages)
        assert self.per_pool * len(pages) == self.rows, "pools of one size"
        self.drop, self.losses, device = formats.drop, losses, losses.device
        self.capacity = (0,) * self.drop + tuple(f.tokens_per_page for f in formats.formats)
        least = 0 if self.drop else self.per_pool * formats.formats[0].pages(self.span)
        for number in pages:
            if number < least:
                raise ValueError(
                    f"{number} pages cannot hold {self.span} tokens of {self.per_pool} heads "
                    "without dropping any"
                )
        per_token = tuple(1 / c if c else 0.0 for c in self.capacity)
        self.costs = _constant(per_token, torch.float64, device)
        self.pages = _on_device(pages, device)
        # Where option 0 is a list, its last page may be part empty.
        spare = 0.0 if self.drop else self.per_pool * (1 - 1 / self.capacity[0])
        self._budget = (self.pages - spare).unsqueeze(1)
        dearer = [cost - per_token[0] for cost in per_token if cost > per_token[0]]
        self._least_cost = min(dearer, default=1.0)
        self._gains = torch.empty(self.rows, self.span, device=device)
        self._held = torch.zeros(self.rows, self.span, dtype=torch.int8, device=device)

    def lagrangian(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solve the problem in which a token may take any share of a page.

        Returns:
            The least price at which the pages suffice, float64 ``[pools]``; tokens wanted when the
            pages left at that price go to tokens that would take them at any lower one, float64
            ``[pools, heads, options]``; and the dual's value, ``[pools]``.
        """
        most = self.losses.amax((1, 3)).view(-1, self.per_pool).amax(1, keepdim=True)
        high = most.double() / self._least_cost + 1e-30
        low = high * _PRICE_RANGE
        number = kernels.PRICES.value
        steps = _constant(
            tuple(i / (number + 1) for i in range(number + 2)), torch.float64, high.device
        )
        for _ in range(_ROUNDS):
            edges = low * (high / low) ** steps
            above = (self._asked(edges[:, 1:-1]) > self._budget).sum(1, keepdim=True)
            low, high = edges.gather(1, above), edges.gather(1, above + 1)
        counts, totals = self._counts(torch.cat((torch.zeros_like(low), low, high), 1))
        asked = (counts * self.costs).sum((2, 3))
        left = (self._budget - asked[:, 2:]) / (asked[:, 1:2] - asked[:, 2:])
        left = left.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).view(-1, 1, 1)
        free = asked[:, :1] <= self._budget
        wanted = torch.where(
            free.unsqueeze(2), counts[:, 0], counts[:, 2] + left * (counts[:, 1] - counts[:, 2])
        )
        price = torch.where(free, 0.0, high).squeeze(1)
        # At price 0 pages are free, which is a bound as well.
        bound = torch.maximum(totals[:, 2] - high.squeeze(1) * self.pages, totals[:, 0])
        return price, wanted, bound

    def _asked(self, prices: torch.Tensor) -> torch.Tensor:
        """Pages that pools would take at ``PRICES`` prices each, float64 ``[pools, PRICES]``."""
        pages = torch.empty(self.rows, prices.shape[1], device=prices.device)
        kernels.ask_pages[(self.rows,)](
            self.losses,
            self.heads,
            self.span,
            self.per_pool,
            self.costs,
            prices.float().contiguous(),
            pages,
            OPTIONS=self.options,
            num_warps=kernels.NUM_WARPS,
        )
        return pages.double().view(-1, self.per_pool, prices.shape[1]).sum(1)

    def _counts(self, prices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each option at some prices, and the least priced losses of all tokens.

        Returns:
            int64 ``[pools, prices, heads, options]``; float64 ``[pools, prices]``.
        """
        number = prices.shape[1]
        shape, device = (self.rows, number), prices.device
        counts = torch.empty(*shape, self.options, dtype=torch.int32, device=device)
        totals = torch.empty(shape, dtype=torch.float64, device=device)
        kernels.count_options[shape](
            self.losses,
            self.heads,
            self.span,
            self.per_pool,
            self.costs,
            prices,
            counts,
            totals,
            OPTIONS=self.options,
            PADDED=triton.next_power_of_2(self.options),
            num_warps=kernels.NUM_WARPS,
        )
        counts = counts.long().view(-1, self.per_pool, number, self.options).transpose(1, 2)
        return counts, totals.view(-1, self.per_pool, number).sum(1)

    def whole_pages(self, price: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Tokens that each option may hold, int64 ``[rows, options]``; option 0 takes the rest.

        Lists start below what they want. Giving one of them another page costs priced loss: that of
        the tokens that would come next. The cheapest pages are given first, as long as all fit.
        """
        device, steps = price.device, _PAGES_BELOW + _PAGES_ABOVE
        lists = _constant(self.capacity[1:], torch.int64, device)
        base = (wanted[..., 1:] / lists).floor().long().sub(_PAGES_BELOW).clamp_min(0)
        step = torch.arange(steps + 1, device=device)
        ends = ((base.unsqueeze(-1) + step) * lists.unsqueeze(-1)).clamp_max(self.span)
        paid = price.view(-1, 1, 1) * self.costs
        rows = paid.expand(-1, self.per_pool, -1).reshape(self.rows, -1).float()
        cost = torch.empty(*base.shape, steps, dtype=torch.float64, device=device)
        sums = torch.empty(self.rows, steps + 1, dtype=torch.float64, device=device)
        for index in range(1, self.options):
            self._find_gains(index, rows, kernels.ALL)
            ranks = ends[:, :, index - 1].reshape(self.rows, -1).contiguous()
            kernels.top_sums[tuple(ranks.shape)](
                self._gains, self.span, ranks, sums, num_warps=kernels.NUM_WARPS
            )
            gained = sums.view(-1, self.per_pool, steps + 1)
            gained = gained - ends[:, :, index - 1] * paid[..., index : index + 1]
            cost[:, :, index - 1] = -gained.diff(dim=-1)
        rank = cost.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).view_as(cost)
        given = torch.arange(cost[0].numel() + 1, device=device)
        taken = rank.unsqueeze(1) < given.view(1, -1, 1, 1, 1)
        room = _filled(base.unsqueeze(1) + taken.sum(-1), self.capacity, self.span)
        pages = sum(-(room[..., i] // -c) for i, c in enumerate(self.capacity) if c)
        fits = pages.sum(-1) <= self.pages.unsqueeze(1)
        most = torch.where(fits, given, 0).amax(1).view(-1, 1, 1, 1)
        room = room.gather(1, most.expand(-1, 1, *room.shape[2:]))
        return room.reshape(self.rows, -1)

    def assign(self, price: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Fill the lists: option of each token, int8 ``[rows, span]``.

        Args:
            price: where the lists' prices start from, float64 ``[pools]``.
            room: tokens of each option, int64 ``[rows, options]``.
        """
        start = price.unsqueeze(1) * (self.costs - self.costs[0])
        prices = start.repeat_interleave(self.per_pool, 0, output_size=self.rows).float()
        options = range(self.options - 1, 0, -1)
        for _ in range(_CLEARINGS):
            for index in options:
                self._find_gains(index, prices, kernels.ALL)
                kernels.clear_list[(self.rows,)](
                    self._gains,
                    self.span,
                    room,
                    prices,
                    LIST=index,
                    OPTIONS=self.options,
                    DROP=self.drop,
                    num_warps=kernels.NUM_WARPS,
                )
        for index in options:
            self._find_gains(index, prices, kernels.CHEAPER)
            self._fill(index, room[:, index].contiguous())
        # What room is left goes to those who gain by it, whatever it was to cost.
        for index in options:
            self._find_gains(index, prices, kernels.HELD)
            self._fill(index, room[:, index] - (self._held == index).sum(1))
        return self._held

    def _find_gains(self, index: int, prices: torch.Tensor, over: int) -> None:
        kernels.list_gains[(triton.cdiv(self.span, kernels.TILE.value), self.rows)](
            self.losses,
            self.heads,
            self.span,
            prices,
            self._held,
            self._gains,
            LIST=index,
            OPTIONS=self.options,
            OVER=over,
            DROP=self.drop,
        )

    def _fill(self, index: int, room: torch.Tensor) -> None:
        kernels.fill_list[(self.rows,)](
            self._gains, self.span, room, self._held, LIST=index, num_warps=kernels.NUM_WARPS
        )


def _filled(pages: torch.Tensor, capacity: tuple[int, ...], span: int) -> torch.Tensor:
    """Tokens per option, ``[..., options]``, when lists of those pages fill up, the richest first.

    Args:
        pages: int64 ``[..., lists]``.
        capacity: tokens per page of each option.
        span: tokens there are.
    """
    rest = torch.full_like(pages.sum(-1), span)
    room = []
    for index in range(len(capacity) - 1, 0, -1):
        room.append(torch.minimum(pages[..., index - 1] * capacity[index], rest))
        rest = rest - room[-1]
    return torch.stack((rest, *reversed(room)), -1)
