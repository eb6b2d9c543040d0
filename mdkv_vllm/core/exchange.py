"""The best filling of one head's lists, kept best while their sizes change.

How many tokens each option holds being given, the assignment of least loss is a
transportation problem with few sinks. Its residual network folds into a graph of the
options alone: the cheapest way to move a token from option ``a`` to option ``b`` costs the
least ``loss[b] - loss[a]`` over the tokens that ``a`` holds. Making one option a token
larger and another a token smaller is then a shortest path in that graph, and successive shortest
paths keep an optimal assignment optimal (Ahuja, Magnanti, Orlin, Network Flows, chapter 9).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

RELATIVE_ROUNDING = 1e-12
"""Path lengths closer than this share of the largest loss count as equal."""


class Exchange:
    """An optimal assignment of a head's tokens to options, for a movable number of each.

    Attributes:
        option: option of each token.
        counts: tokens each option holds.
        objective: summed loss.
    """

    def __init__(self, losses: torch.Tensor, option: torch.Tensor) -> None:
        """Start from an assignment that is optimal for its own counts.

        Args:
            losses: float64 ``[options, span]``.
            option: int64 ``[span]``.
        """
        options = losses.shape[0]
        self._losses: list[list[float]] = losses.tolist()
        self._rounding = RELATIVE_ROUNDING * float(losses.abs().max())
        self.option: list[int] = option.tolist()
        self.counts: list[int] = option.bincount(minlength=options).tolist()
        self.objective = float(losses.gather(0, option.unsqueeze(0)).sum())
        # Entries of tokens that have left an option stay until they reach the top.
        self._moves: list[list[list[tuple[float, int]]]] = [
            [[] for _ in range(options)] for _ in range(options)
        ]
        for token, a in enumerate(self.option):
            for b in range(options):
                if b != a:
                    self._moves[a][b].append((self._gain(token, a, b), token))
        for row in self._moves:
            for heap in row:
                heapq.heapify(heap)

    def move_to(self, counts: Sequence[int]) -> None:
        """Make every option hold that many tokens; they must sum to the span."""
        for to, wanted in enumerate(counts):
            while self.counts[to] < wanted:
                self._grow(to, counts)

    def _gain(self, token: int, a: int, b: int) -> float:
        return self._losses[b][token] - self._losses[a][token]

    def _cheapest(self, a: int, b: int) -> tuple[float, int]:
        heap = self._moves[a][b]
        while heap and self.option[heap[0][1]] != a:
            heapq.heappop(heap)
        return heap[0] if heap else (math.inf, -1)

    def _grow(self, to: int, counts: Sequence[int]) -> None:
        """Bring option ``to`` one token from whichever option above its count is nearest."""
        options = range(len(counts))
        edges = [[self._cheapest(a, b) if a != b else (0.0, -1) for b in options] for a in options]
        distance, following = [math.inf] * len(counts), [to] * len(counts)
        distance[to] = 0.0
        for _ in options[1:]:
            for a in options:
                for b in options:
                    length = edges[a][b][0] + distance[b]
                    if a not in (b, to) and length < distance[a] - self._rounding:
                        distance[a], following[a] = length, b
        at = min((a for a in options if self.counts[a] > counts[a]), key=distance.__getitem__)
        self.objective += distance[at]
        self.counts[at] -= 1
        self.counts[to] += 1
        while at != to:
            after = following[at]
            self._reassign(edges[at][after][1], after)
            at = after

    def _reassign(self, token: int, option: int) -> None:
        self.option[token] = option
        for b, heap in enumerate(self._moves[option]):
            if b != option:
                heapq.heappush(heap, (self._gain(token, option, b), token))
