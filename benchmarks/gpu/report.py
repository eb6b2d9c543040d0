"""Rows of measurements, the short table of them, and what they were meant to reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

COPY_SHARE = 0.80
LARGE_BYTES = 64_000_000
FULL_TIMES = 1.05
QUARTER_TIMES = 0.30
OURS = ("Triton", "CUDA")
"""Our kernels; all others are of full caches."""

Key = tuple[str, int, int, int]
"""A load: model, batch, tokens, layers."""


@dataclass(frozen=True)
class Timed:
    """One kernel's time for one load.

    Attributes:
        model: attention heads, by a model that has them.
        batch: queries.
        tokens: context of each.
        layers: in every block of the cache; a call attends in one.
        kernel: one of :data:`OURS`, or a full cache's.
        holding: what requests hold, as ``Holding.name``.
        budget: share of the full bytes, 1 for a full cache.
        microseconds: median time of a call; NaN where there is none.
        spread: interquartile range over the median.
        in_graph: whether calls were replayed from a CUDA graph.
        kv_bytes: bytes of keys and values of one call.
        moved_bytes: all bytes that one call has to move.
        copy_rate: bytes per second of a copy just before.
        note: why there is no time.
    """

    model: str
    batch: int
    tokens: int
    layers: int
    kernel: str
    holding: str
    budget: float
    microseconds: float
    spread: float
    in_graph: bool
    kv_bytes: int
    moved_bytes: int
    copy_rate: float
    note: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Timed:
        """From a job's row."""
        return cls(**{part.name: row[part.name] for part in fields(cls)})

    @property
    def load(self) -> Key:
        """What was computed."""
        return self.model, self.batch, self.tokens, self.layers

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.moved_bytes / self.microseconds * 1e6

    @property
    def copy_share(self) -> float:
        """Rate over that of the copy."""
        return self.rate / self.copy_rate

    @property
    def line(self) -> str:
        """One line of a log."""
        layers = f", {self.layers} layers" if self.layers > 1 else ""
        name = f"{self.model}, {self.batch} x {self.tokens}{layers}, {self.kernel}, {self.holding}"
        if math.isnan(self.microseconds):
            return f"{name}: {self.note[:100]}"
        return (
            f"{name}: {self.microseconds:.1f} us, {self.moved_bytes / 1e6:.1f} MB, "
            f"{self.rate / 1e9:.0f} GB/s, {self.copy_share:.0%} of copy"
        )

    @property
    def derived(self) -> dict[str, float]:
        """What follows from it."""
        return {"gb_per_s": self.rate / 1e9, "share_of_copy": self.copy_share}


def best_full(rows: Sequence[Timed]) -> dict[Key, Timed]:
    """The fastest full-cache kernel of each load."""
    best: dict[Key, Timed] = {}
    for row in rows:
        if row.kernel not in OURS and not math.isnan(row.microseconds):
            other = best.get(row.load)
            if other is None or row.microseconds < other.microseconds:
                best[row.load] = row
    return best


def faster(rows: Sequence[Timed]) -> list[Timed]:
    """Of our rows, the faster kernel's of every load and holding."""
    best: dict[tuple[Key, str], Timed] = {}
    for row in rows:
        if row.kernel in OURS and not math.isnan(row.microseconds):
            other = best.setdefault((row.load, row.holding), row)
            if row.microseconds < other.microseconds:
                best[row.load, row.holding] = row
    return list(best.values())


def comparison(rows: Sequence[Timed]) -> str:
    """How our kernels compare, where both were timed."""
    times: dict[tuple[Key, str], dict[str, float]] = {}
    for row in rows:
        if row.kernel in OURS and not math.isnan(row.microseconds):
            times.setdefault((row.load, row.holding), {})[row.kernel] = row.microseconds
    ratios = [both["CUDA"] / both["Triton"] for both in times.values() if len(both) == len(OURS)]
    if not ratios:
        return "CUDA against Triton: not both were timed"
    wins = sum(ratio < 1 for ratio in ratios)
    return (
        f"CUDA against Triton: faster in {wins} of {len(ratios)}; time over Triton's "
        f"{min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
    )


def table(rows: Sequence[Timed], kinds: Sequence[str], kernel: str) -> str:
    """A line per load: the best full cache, then one of ours.

    Ours are times over the best full cache's, and shares of the copy's rate.

    Args:
        rows: everything measured.
        kinds: holdings to show.
        kernel: which of :data:`OURS`.
    """
    best = best_full(rows)
    ours = [row.holding for row in rows if row.kernel == kernel]
    holdings = [name for name in dict.fromkeys(ours) if name.split()[0] in kinds]
    head = f"{'model':24} {'batch':>5} {'tokens':>7} {'best full cache':>26}"
    lines = [head + "".join(f" {name:>12}" for name in holdings)]
    for load in dict.fromkeys(row.load for row in rows if row.layers == 1):
        baseline = best.get(load)
        full = f"{baseline.kernel} {baseline.microseconds:.1f} us" if baseline else "none"
        line = f"{load[0][:24]:24} {load[1]:5} {load[2]:7} {full:>26}"
        mine = {row.holding: row for row in rows if row.load == load and row.kernel == kernel}
        lines.append(line + "".join(f" {_cell(mine.get(name), baseline):>12}" for name in holdings))
    return "\n".join(lines)


def translation(rows: Sequence[Timed]) -> list[str]:
    """What a layer takes in a cache of many, over the same in a cache of one: a line each."""
    alone = {
        (row.model, row.batch, row.tokens, row.kernel, row.holding): row
        for row in rows
        if row.layers == 1
    }
    lines = []
    for row in rows:
        one = alone.get((row.model, row.batch, row.tokens, row.kernel, row.holding))
        if row.layers > 1 and one is not None:
            ratio = row.microseconds / one.microseconds
            lines.append(
                f"{row.kernel}, {row.holding}: a layer in a cache of {row.layers} layers takes "
                f"{ratio:.2f} x its time in a cache of one ({one.microseconds:.1f} us)"
            )
    return lines


def in_segments(rows: Sequence[Timed]) -> list[str]:
    """What several leases take, over one of the same budget: a line each."""
    single = {(row.load, row.kernel, row.holding): row.microseconds for row in rows}
    lines = []
    for row in rows:
        one = single.get((row.load, row.kernel, row.holding.replace("segments", "mixed")))
        if row.holding.startswith("segments") and one is not None:
            lines.append(
                f"{row.kernel}, {row.batch} x {row.tokens}, {row.holding}: "
                f"{row.microseconds / one:.2f} x the time of one lease ({one:.1f} us)"
            )
    return lines


def _cell(row: Timed | None, baseline: Timed | None) -> str:
    if row is None or math.isnan(row.microseconds):
        return "-"
    times = f"{row.microseconds / baseline.microseconds:.2f}x " if baseline else ""
    return f"{times}{row.copy_share:4.0%}"


@dataclass(frozen=True)
class Aim:
    """One aim and how often it was reached.

    Attributes:
        text: the aim.
        reached: rows that reach it.
        rows: rows that it is for.
        worst: the row furthest from it, in words.
    """

    text: str
    reached: int
    rows: int
    worst: str

    @property
    def line(self) -> str:
        """One line of a report."""
        if not self.rows:
            return f"{self.text}: nothing measured"
        return f"{self.text}: {self.reached} of {self.rows}; worst {self.worst}"


def aims(rows: Sequence[Timed]) -> list[Aim]:
    """Hold our rows, the faster kernel's, against what was aimed at."""
    best, ours = best_full(rows), faster(rows)

    def times(row: Timed) -> float:
        return row.microseconds / best[row.load].microseconds

    compared = [row for row in ours if row.load in best]
    return [
        _aim(
            f"at least {COPY_SHARE:.0%} of the copy's rate from {LARGE_BYTES / 1e6:.0f} MB of KV",
            [row for row in ours if row.kv_bytes >= LARGE_BYTES],
            lambda row: -row.copy_share,
            -COPY_SHARE,
        ),
        _aim(
            f"at 100 % at most {FULL_TIMES} x the best full cache",
            [row for row in compared if row.budget == 1.0],
            times,
            FULL_TIMES,
        ),
        _aim(
            f"at 25 % at most {QUARTER_TIMES} x the best full cache",
            [row for row in compared if row.budget == 0.25],
            times,
            QUARTER_TIMES,
        ),
    ]


def _aim(text: str, rows: Sequence[Timed], value: Callable[[Timed], float], most: float) -> Aim:
    worst = max(rows, key=value, default=None)
    told = ""
    if worst is not None:
        name = f"{worst.model}, {worst.batch} x {worst.tokens}, {worst.holding}"
        told = f"{abs(value(worst)):.2f} ({name})"
    return Aim(text, sum(value(row) <= most for row in rows), len(rows), told)
