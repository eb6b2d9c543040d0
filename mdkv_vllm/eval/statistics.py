"""Rows to figures: means, intervals, and what may be compared."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mdkv_vllm.eval.rows import Row

FULL = "full"
"""Name of the method that all others are compared with."""
SOLVED = 0.8
"""Accuracy of full attention from which a task says something about compression."""


@dataclass(frozen=True)
class Summary:
    """A method at a budget over some tasks.

    Attributes:
        method: its name.
        budget: share of bytes asked for.
        share: mean share of bytes held, None where that is not known.
        count: answers.
        accuracy: mean score.
        low: lower end of the 95 % Wilson interval of the accuracy.
        high: its upper end.
        divergence: mean over the rows that have one, nats per token.
        agreement: likewise.
    """

    method: str
    budget: float
    share: float | None
    count: int
    accuracy: float | None
    low: float | None
    high: float | None
    divergence: float | None
    agreement: float | None


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927); partial scores are treated as shares of successes.

    Args:
        mean: mean score, 0 to 1.
        count: number of scores, from 1.
        z: quantile of the normal distribution; 1.96 for 95 %.
    """
    centre = mean + z * z / (2 * count)
    spread = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per method and budget, in order of first appearance."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.budget].append(row)
    return [_summary(method, budget, group) for (method, budget), group in groups.items()]


def _summary(method: str, budget: float, rows: Sequence[Row]) -> Summary:
    scores = [row.score for row in rows if row.score is not None]
    accuracy = _mean(scores)
    low, high = wilson(accuracy, len(scores)) if accuracy is not None else (None, None)
    return Summary(
        method,
        budget,
        _mean([row.share for row in rows if row.share is not None]),
        len(rows),
        accuracy,
        low,
        high,
        _mean([row.divergence for row in rows if row.divergence is not None]),
        _mean([row.agreement for row in rows if row.agreement is not None]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def solved_tasks(rows: Iterable[Row]) -> set[tuple[str, int]]:
    """Tasks, with their length, that full attention solves at :data:`SOLVED` or more."""
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.method == FULL and row.score is not None:
            scores[row.task, row.length].append(row.score)
    return {key for key, values in scores.items() if math.fsum(values) / len(values) >= SOLVED}
