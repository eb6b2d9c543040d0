"""How many pages each head gets: HeadKV's budgets (arXiv 2410.19258) in whole pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

_BISECTIONS = 60


@dataclass(frozen=True)
class HeadBudgets:
    """How unequally heads are treated.

    Attributes:
        scores: importance of each KV head, float ``[layers, kv_heads]``, at least 0.
        share: part of the budget handed out by scores, in [0, 1]; the rest is spread evenly.
            HeadKV's beta is ``1 / share``.
        power: exponent of the scores, above 0; below 1 it brings heads closer together. HeadKV's
            temperature, which its paper leaves at 1.
    """

    scores: torch.Tensor
    share: float
    power: float = 1.0

    def of_part(self, layers: slice, heads: slice) -> HeadBudgets:
        """Budgets of some KV heads of some layers, which have a lease of their own."""
        return replace(self, scores=self.scores[layers, heads])

    def pages(self, total: int, least: int, most: int) -> torch.Tensor:
        """Divide pages among heads.

        ``b_h = (1 - share) b + share S_h b L H`` for the mean budget ``b``, with ``S`` the scores
        to their power, scaled to sum to 1 (HeadKV's formula with ``share = 1 / beta``). What a
        head cannot use goes to the others in the same proportions; HeadKV's own code loses it.

        Args:
            total: pages to divide.
            least: pages every head needs.
            most: pages with which a head holds its whole prompt at the richest format.

        Returns:
            int64 ``[layers, kv_heads]``, each from ``least`` to ``most``, summing to ``total``
            or, where that is more than all heads can use, to ``most`` each.

        Raises:
            ValueError: ``total`` is less than ``least`` for every head.
        """
        heads = self.scores.numel()
        if total < least * heads:
            raise ValueError(f"{total} pages are fewer than {least} for each of {heads} heads")
        if total >= most * heads:
            return torch.full(self.scores.shape, most, dtype=torch.int64)
        scores = self.scores.double().flatten() ** self.power
        total_score = scores.sum().clamp_min(1e-30)
        # A head with nothing to its name still takes what no other can use.
        wanted = ((1 - self.share) / heads + self.share * scores / total_score).clamp_min(1e-9)
        low, high = 0.0, most / float(wanted.min())
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if float((middle * wanted).clamp(least, most).sum()) > total:
                high = middle
            else:
                low = middle
        exact = (low * wanted).clamp(least, most)
        pages = exact.floor().long()
        missing = total - int(pages.sum())
        # Heads at their limit have no remainder, so they come last and are never reached.
        pages[(exact - pages).argsort(descending=True, stable=True)[:missing]] += 1
        return pages.view(self.scores.shape)
