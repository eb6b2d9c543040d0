"""One example of a task, and how its answers are scored."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

AGREEMENT = "agreement"
"""Scoring of answers that have no reference: they are compared with full attention's."""


class ScoringError(ValueError):
    """A turn that cannot be scored as asked; the message says what is allowed."""


@dataclass(frozen=True)
class Turn:
    """One question and what counts as its answer.

    Attributes:
        question: what the user asks; the first turn's follows the context.
        answers: reference strings; none with ``agreement``.
        scoring: ``all``: share of the references that the answer contains, whatever the case
            (RULER, arXiv 2404.06654, section 3); ``any``: 1 where it contains one of them;
            ``label``: 1 where its first line is a reference; ``f1``: overlap of words as in
            SQuAD (arXiv 1606.05250); ``rouge``: ROUGE-L (Lin 2004);
            ``agreement``: scored elsewhere against the answer of full attention.
        max_tokens: tokens to generate, from 1.
        answer_prefix: words that the assistant's answer is made to begin with, or "".
        given: words that the assistant is taken to have generated after those, or "": the answer
            goes on from them, and with ``agreement`` it is they that are compared.

    Raises:
        ScoringError: an unknown scoring, or references missing or superfluous for it.
    """

    question: str
    answers: tuple[str, ...]
    scoring: str
    max_tokens: int
    answer_prefix: str = ""
    given: str = ""

    def __post_init__(self) -> None:
        if self.scoring not in (*_SCORES, AGREEMENT):
            raise ScoringError(
                f"scoring is {self.scoring!r}; allowed are {', '.join((*_SCORES, AGREEMENT))}"
            )
        if self.max_tokens < 1:
            raise ScoringError(f"max_tokens is {self.max_tokens}; allowed are numbers from 1 up")
        if self.scoring == AGREEMENT and self.answers:
            raise ScoringError(f"answers are {self.answers!r}; scoring 'agreement' takes none")
        if self.scoring != AGREEMENT and not any(self.answers):
            raise ScoringError(f"answers are empty; scoring {self.scoring!r} needs one or more")


@dataclass(frozen=True)
class Example:
    """A long text and the questions about it.

    Attributes:
        task: name of the task.
        index: number of the example within its task and length, from 0.
        length: prompt tokens asked for.
        context: the long text, with the task's instruction at its beginning.
        turns: one, or several for a conversation about the same text.
        depth: where in the text the answer lies, 0 (beginning) to 1 (end); None where it is
            in several places or unknown.
    """

    task: str
    index: int
    length: int
    context: str
    turns: tuple[Turn, ...]
    depth: float | None = None

    @property
    def key(self) -> str:
        """A name no other example of the same run has."""
        return f"{self.task}/{self.length}/{self.index}"

    @property
    def split(self) -> str:
        """``choose`` or ``report``: settings are chosen on one half, reported on the other."""
        return "report" if self.index % 2 else "choose"


def score(turn: Turn, answer: str) -> float:
    """How good an answer is, from 0 to 1.

    Args:
        turn: the question with its references and scoring.
        answer: what the model generated, with or without the answer prefix except for
            ``label``, which looks at what follows the prefix.

    Raises:
        ScoringError: the turn's scoring is ``agreement``, which needs a second answer.
    """
    if turn.scoring == AGREEMENT:
        raise ScoringError(
            "scoring 'agreement' compares with the answer of full attention and cannot score an "
            f"answer by itself; allowed here are {', '.join(_SCORES)}"
        )
    return _SCORES[turn.scoring](answer, turn.answers)


def _contained_share(answer: str, references: tuple[str, ...]) -> float:
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def _contains_any(answer: str, references: tuple[str, ...]) -> float:
    return float(any(reference.lower() in answer.lower() for reference in references))


def _first_line_equals(answer: str, references: tuple[str, ...]) -> float:
    lines = answer.strip().splitlines()
    label = _bare(lines[0]) if lines else ""
    return float(label in map(_bare, references))


def _word_f1(answer: str, references: tuple[str, ...]) -> float:
    words = _content_words(answer)
    return max(
        _f1(sum((Counter(words) & Counter(other)).values()), len(words), len(other))
        for other in map(_content_words, references)
    )


def _rouge_l(answer: str, references: tuple[str, ...]) -> float:
    """ROUGE-L F1 (Lin 2004, section 3.1): the text taken as one sequence of lower-case words."""
    words = _words(answer)
    return max(
        _f1(_common_subsequence(words, other), len(words), len(other))
        for other in map(_words, references)
    )


_SCORES: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "all": _contained_share,
    "any": _contains_any,
    "label": _first_line_equals,
    "f1": _word_f1,
    "rouge": _rouge_l,
}


def _bare(label: str) -> str:
    return label.strip(string.punctuation + string.whitespace).lower()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _content_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares them."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _f1(common: int, answer_words: int, reference_words: int) -> float:
    if not common:
        return 0.0
    return 2 * common / (answer_words + reference_words)


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by the usual recurrence kept to one row."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
