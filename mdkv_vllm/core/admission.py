"""Whether those that run leave room for one more request: how much they grow before they give back.

A request grows by a block every ``block_size`` tokens and gives blocks back whenever a segment is
compressed, so what many hold together rises and falls. One admitted because it fits now, while
all others are about to grow, would have them preempted, which costs their whole prefill again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """What is to come of a request that computes one token a step.

    Attributes:
        held: blocks that it holds.
        until_end: tokens until it ends and gives back all of them; None where that is not known.
        until_due: tokens until its next segment is due; None where it has none.
        freed: blocks that this gives back.
    """

    held: int
    until_end: int | None
    until_due: int | None = None
    freed: int = 0


def most_growth(requests: Iterable[Growth], block_size: int, tokens: int) -> int:
    """Blocks that requests take together at most, beyond what they hold, in so many tokens each.

    Of every request one segment is seen. Exact for requests that hold whole blocks; up to a block
    of each too much for others.

    Args:
        requests: those that run side by side.
        block_size: tokens in one block.
        tokens: how far to look.
    """
    points = -(-tokens // block_size) + 1
    ending, freed, growing = [0] * points, [0] * points, 0
    for one in requests:
        growing += 1
        # Blocks grown before it happens are held until then, so it counts one point later.
        end, due = (
            points if left is None else -(-left // block_size) + 1
            for left in (one.until_end, one.until_due)
        )
        if due < min(end, points):
            freed[due] += one.freed
        if end < points:
            ending[end] += 1
            freed[end] += one.held - (one.freed if due < end else 0)
    most = given_back = 0
    for point in range(points):
        growing -= ending[point]
        given_back += freed[point]
        most = max(most, growing * point - given_back)
    return most
