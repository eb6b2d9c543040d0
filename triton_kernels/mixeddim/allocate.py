"""Allocation on the device: what :mod:`mdkv_vllm.core.allocate` does, without waiting for a result.

The price of a page is found digit by digit. Around that solution every list
is given whole pages, those that cost least first, as many as there are; the total is
exact by construction. Then every list gets a price of its own at which as many tokens want it
as it has room for, found one list after the other (an assignment's dual, by coordinates), and
takes those that gain most. The reference searches more choices of pages and assigns tokens
optimally; the tests measure how far behind this stays.

All pools of pages are solved at once, with as many launches for many layers as for one, whose
shapes follow from the number of tokens. Memory per token, head and layer: its losses (4 bytes per
option), gains (4 per option), and its choice (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import triton

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.formats import FormatSet

from .allocate_kernels import NUM_WARPS, ROUNDS, SHARE, STEPS, ask_prices, count_options
from .assign_kernel import assign
from .page_kernels import give_pages, last_bracket, page_costs, settle
from .select_kernel import DIGITS, whole_tiles

_CLEARINGS = 4
"""Rounds in which every list's price is set anew."""


def allocate(
    losses: Sequence[torch.Tensor], formats: FormatSet, budgets: Sequence[Sequence[int]]
) -> list[Allocation]:
    """Choose a format for every token of some layers, each pool within its pages.

    A pool's result does not depend on what else is in the call.

    Args:
        losses: per layer, ``[options, kv_heads, span]`` of any float type, of which float32 is
            used; options in the order of ``formats.names``. As one tensor, it is not copied.
        formats: the formats allowed.
        budgets: per layer, the pages of each of its pools, as many pools in every layer; its
            heads are divided evenly among them, in order.

    Returns:
        Per layer as the reference; choices are int8, objective and bound float64 tensors of one
        element. The bound is the dual's value at the price found, a little below its best where
        nothing may be dropped.

    Raises:
        ValueError: nothing may be dropped and the cheapest format does not fit.
    """
    if isinstance(losses, torch.Tensor):
        together = losses
    else:
        together = torch.stack([layer.float() for layer in losses])
    pages = [budget for pools in budgets for budget in pools]
    choice, tokens, objective, bounds = _Pools(together, formats, pages).solve()
    layers = len(together)
    batched = (
        choice.view(layers, -1, choice.shape[-1]),
        tokens.view(layers, -1, tokens.shape[-1]),
        objective.view(layers, -1).sum(1),
        bounds.view(layers, -1).sum(1),
    )
    return [Allocation(*layer) for layer in zip(*batched, strict=True)]


@cache
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is copied to the device once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float64 ``[numbers]``, copied without waiting; once for prompts of a length, so that a graph
    that was captured after one of them copies nothing.
    """
    host = torch.tensor(numbers, dtype=torch.float64)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class _Pools:
    """Pools of pages, each for some rows (KV heads of a layer).

    Args:
        losses: float32 ``[layers, options, kv_heads, span]``, contiguous.
        formats: the formats allowed.
        pages: of each pool.
    """

    def __init__(self, losses: torch.Tensor, formats: FormatSet, pages: Sequence[int]) -> None:
        layers, self._options, self._heads, self._span = losses.shape
        self._rows, self._per_pool = layers * self._heads, layers * self._heads // len(pages)
        assert self._per_pool * len(pages) == self._rows, "pools of one size"
        self._losses, self._drop, self._pools = losses, int(formats.drop), len(pages)
        # Option 0 takes the tokens that the others leave.
        capacity = (0,) * self._drop + tuple(f.tokens_per_page for f in formats.formats)
        least = 0 if self._drop else self._per_pool * formats.cheapest.pages(self._span)
        for number in pages:
            if number < least:
                raise ValueError(
                    f"{number} pages cannot hold {self._span} tokens of {self._per_pool} heads "
                    "without dropping any"
                )
        per_token = tuple(1 / c if c else 0.0 for c in capacity)
        # Where option 0 is a list, its last page may be part empty.
        spare = 0.0 if self._drop else self._per_pool * (1 - 1 / capacity[0])
        both = _on_device((*pages, *(number - spare for number in pages)), losses.device)
        self._pages, self._budgets = both[: self._pools], both[self._pools :]
        self._costs = _constant(per_token, torch.float64, losses.device)
        per_page = [1 / (k - i) if k > i else 0.0 for i in per_token for k in per_token]
        self._per_page = _constant(tuple(per_page), torch.float32, losses.device)
        self._capacity = _constant(capacity, torch.int64, losses.device)
        self._padded_rows = triton.next_power_of_2(self._per_pool)

    def solve(self) -> tuple[torch.Tensor, ...]:
        """Choices, int8 ``[rows, span]``; tokens, int64 ``[rows, lists]``; objectives and bounds,
        float64 ``[rows]`` and ``[pools]``.
        """
        wanted, paid, over, bounds = self._lagrangian()
        room = self._whole_pages(wanted, paid)
        rows, device = self._rows, self._losses.device
        choice = torch.empty(rows, self._span, dtype=torch.int8, device=device)
        lists = self._options - self._drop
        tokens = torch.empty(rows, lists, dtype=torch.int64, device=device)
        objective = torch.empty(rows, dtype=torch.float64, device=device)
        length = whole_tiles(self._span)
        gains = torch.empty(rows, length, dtype=torch.int32, device=device)
        assign[(rows,)](
            *self._source(), length, room, over, _CLEARINGS, gains, choice, tokens, objective,
            OPTIONS=self._options, DROP=self._drop, num_warps=NUM_WARPS,
        )  # fmt: skip
        return choice, tokens, objective, bounds

    def _source(self) -> tuple[torch.Tensor, int, int]:
        return self._losses, self._heads, self._span

    def _lagrangian(self) -> tuple[torch.Tensor, ...]:
        """Solve the problem in which a token may take any share of a page; see :func:`.settle`."""
        pools, options, device = self._pools, self._options, self._losses.device
        found = torch.empty(ROUNDS, pools, dtype=torch.int32, device=device)
        above = torch.empty(ROUNDS, pools, dtype=torch.float64, device=device)
        lists, digits = max(options - 1, 1), DIGITS.value
        counts = torch.zeros(ROUNDS, pools, lists, digits, dtype=torch.int32, device=device)
        for number in range(ROUNDS):
            ask_prices[(triton.cdiv(self._span, SHARE), self._rows)](
                *self._source(), self._per_pool, self._costs, self._per_page, self._budgets, found,
                above, counts, number, OPTIONS=options, SHARE=SHARE, num_warps=NUM_WARPS,
            )  # fmt: skip
        prices = torch.empty(pools, 3, dtype=torch.float64, device=device)
        last_bracket[(pools,)](
            found[ROUNDS - 1], above[ROUNDS - 1], counts[ROUNDS - 1], self._costs, self._budgets,
            prices, OPTIONS=options, ROUNDS=ROUNDS, num_warps=1,
        )  # fmt: skip
        exact = torch.empty(self._rows, 3, options, dtype=torch.int32, device=device)
        totals = torch.empty(self._rows, 3, dtype=torch.float64, device=device)
        count_options[(self._rows, 3)](
            *self._source(), self._per_pool, self._costs, prices, exact, totals, OPTIONS=options,
            PADDED=triton.next_power_of_2(options), num_warps=NUM_WARPS,
        )  # fmt: skip
        wanted = torch.empty(self._rows, options, dtype=torch.int32, device=device)
        paid, over = torch.empty(2, self._rows, options, device=device)
        bounds = torch.empty(pools, dtype=torch.float64, device=device)
        settle[(pools,)](
            prices, exact, totals, self._costs, self._capacity, self._budgets, self._pages,
            self._per_pool, wanted, paid, over, bounds, OPTIONS=options, ROWS=self._padded_rows,
            num_warps=1,
        )  # fmt: skip
        return wanted, paid, over, bounds

    def _whole_pages(self, wanted: torch.Tensor, paid: torch.Tensor) -> torch.Tensor:
        """Tokens that each option may hold, int64 ``[rows, options]``; option 0 takes the rest.

        Lists start below what they want. Giving one of them another page costs priced loss: that of
        the tokens that would come next. The cheapest pages are given first, as long as all fit.
        """
        rows, lists, steps, device = self._rows, self._options - 1, STEPS.value, wanted.device
        room = torch.empty(rows, self._options, dtype=torch.int64, device=device)
        if lists == 0:
            return room.fill_(self._span)
        length = whole_tiles(self._span)
        gains = torch.empty(rows, lists, length, dtype=torch.int32, device=device)
        cost = torch.empty(rows, lists, steps, dtype=torch.float64, device=device)
        page_costs[(rows, lists)](
            *self._source(), length, paid, self._capacity, wanted, gains, cost,
            OPTIONS=self._options, num_warps=NUM_WARPS,
        )  # fmt: skip
        ranks = torch.empty_like(cost, dtype=torch.int32)
        give_pages[(self._pools,)](
            cost, self._capacity, wanted, self._pages, self._per_pool, self._span, ranks, room,
            OPTIONS=self._options, ROWS=self._padded_rows,
            NUMBERS=triton.next_power_of_2(self._per_pool * lists * steps), num_warps=4,
        )  # fmt: skip
        return room
