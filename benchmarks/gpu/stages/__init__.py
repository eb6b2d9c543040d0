"""What a run of the kit does: stages, each a list of jobs and a report of what they told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..jobs import Ended, Job, Row
from ..loads import Load


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        seed: of all inputs.
        workers: processes at once, where nothing is timed.
        rehearse: whether it is a walk through on a CPU, with sizes as small as they get.
        everything: whether there is time for all variants and loads.
        loads: to time instead of the usual ones; empty for those.
    """

    seed: int
    workers: int
    rehearse: bool = False
    everything: bool = False
    loads: tuple[Load, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        seconds: deadline, from start to last line.
        jobs: what it runs, in order of worth.
        report: its important lines, of all rows and of how the jobs ended.
    """

    seconds: float
    jobs: Callable[[Options], list[Job]]
    report: Callable[[Sequence[Row], Sequence[Ended]], list[str]]


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of one kind."""
    return [row for row in rows if row["kind"] == kind]
