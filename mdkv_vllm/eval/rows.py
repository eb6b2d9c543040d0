"""Measured rows, one JSON object a line, so that a run can be stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mdkv_vllm.tasks.example import Example, score


@dataclass(frozen=True)
class Row:
    """One method's answer to one turn of one example.

    Attributes:
        example: the example's key.
        task: its task.
        length: prompt tokens asked for.
        depth: place of the needle, 0 to 1, if it has one.
        split: ``choose`` or ``report``.
        turn: index of the turn.
        method: the method's name.
        budget: share of bytes asked for.
        share: share of bytes held: lease, window and basis over the full cache in 16 bit; None
            where a server was asked, which does not say.
        score: 0 to 1, None where the task has no reference answer.
        divergence: mean Kullback-Leibler divergence from full attention, nats per token, along
            full attention's own answer; None where it was not measured.
        agreement: share of those tokens that are the method's first choice as well.
        answer: what was generated.
        end_share: like ``share``, after an answer that the task gives; None where it gives none.
        quarters: divergence and agreement in each quarter of that answer.
    """

    example: str
    task: str
    length: int
    depth: float | None
    split: str
    turn: int
    method: str
    budget: float
    share: float | None
    score: float | None
    divergence: float | None
    agreement: float | None
    answer: str
    end_share: float | None = None
    quarters: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, example: Example, turn: int, **measured: Any) -> Row:  # noqa: ANN401
        """A row about a turn of an example; ``measured``: method to answer, without the score."""
        asked = example.turns[turn]
        return cls(
            example=example.key,
            task=example.task,
            length=example.length,
            depth=example.depth,
            split=example.split,
            turn=turn,
            score=score(asked, measured["answer"]) if asked.answers else None,
            **measured,
        )

    @property
    def key(self) -> tuple[str, int, str, float]:
        """What a row measures."""
        return self.example, self.turn, self.method, round(self.budget, 6)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; none if it does not exist.

    Raises:
        ValueError: a line is no row of this version.
    """
    rows = []
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = Row(**json.loads(line))
                rows.append(replace(row, quarters=tuple((kl, same) for kl, same in row.quarters)))
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"--out: {path}:{number} is no row of results: {error}") from error
    return rows


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
