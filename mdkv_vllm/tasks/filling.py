"""Bring texts to their depth, and series to any length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


def hide(needles: Iterable[tuple[float, str]], sentences: list[str]) -> str:
    """Put needles between sentences.

    Args:
        needles: depth, 0 to 1 in characters of the sentences, and text of each; those that
            meet between the same two sentences keep their order.
        sentences: the text.

    Returns:
        the text with each needle at the first gap from its depth on.
    """
    ends = list(accumulate(map(len, sentences), initial=0))
    gaps: list[list[str]] = [[] for _ in ends]
    for depth, needle in needles:
        gaps[bisect_left(ends, depth * ends[-1])].append(needle)
    pieces = list(gaps[0])
    for sentence, gap in zip(sentences, gaps[1:], strict=True):
        pieces += [sentence, *gap]
    return " ".join(pieces)


def place(item: T, depth: float, others: list[T]) -> list[T]:
    """A list with one more item at a depth from 0 (first) to 1 (last)."""
    at = round(depth * len(others))
    return [*others[:at], item, *others[at:]]


def series(draw: Callable[[], T]) -> Callable[[int], list[T]]:
    """A function from a number to that many values, whose shorter results begin the longer."""
    drawn: list[T] = []

    def first(number: int) -> list[T]:
        while len(drawn) < number:
            drawn.append(draw())
        return drawn[:number]

    return first
