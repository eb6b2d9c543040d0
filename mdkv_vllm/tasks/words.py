"""Word counting: common and frequent words extraction (RULER, arXiv 2404.06654, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from random import Random

from mdkv_vllm.tasks.example import Turn
from mdkv_vllm.tasks.filling import series
from mdkv_vllm.tasks.task import Draft, Setting, Task
from mdkv_vllm.tasks.vocabulary import coded_word, distinct

_COMMON_WORDS = 10
_FULL_LENGTH = 4096
_REPEATS, _SHORT_REPEATS = (30, 3), (10, 1)
"""How often a common and an uncommon word occur, from 4096 tokens on and below."""
_FEWEST_CODED = 64
"""Words from which the ranks 2, 3, 4 and 5 differ in how often they occur."""
_DOTS = "..."


def _common(setting: Setting) -> Callable[[int], Draft]:
    """A numbered list of words; the size is the number of uncommon words."""
    random = setting.random
    often, seldom = _REPEATS if setting.length >= _FULL_LENGTH else _SHORT_REPEATS
    common = distinct(coded_word, random, _COMMON_WORDS)
    uncommon = series(lambda: _other_than(common, random))
    order = random.random()
    turn = Turn(
        f"Which {_COMMON_WORDS} words occur most often in the list above?",
        tuple(common),
        "all",
        120,
        f"The {_COMMON_WORDS} words that occur most often in the list are:",
    )

    def build(size: int) -> Draft:
        words = common * often + uncommon(size) * seldom
        Random(order).shuffle(words)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
        instruction = "Below is a numbered list of words. Keep in mind which occur most often."
        return Draft(f"{instruction}\n\n{listed}", (turn,))

    return build


def _frequent(setting: Setting) -> Callable[[int], Draft]:
    """A text of coded words; the size is the number of words beyond the fewest.

    The word of rank ``k`` makes up a share ``k**-2 / zeta(2)`` of the text, as in RULER, where
    rank 1 is dots that are to be ignored; the answer is the ranks 2 to 4.
    """
    random = setting.random
    ranks = int((setting.length * 6) ** 0.5 / pi) + 1
    vocabulary = distinct(coded_word, random, ranks + 4)
    order = random.random()
    turn = Turn(
        "Ignore the dots '...'. Which three words occur most often in the coded text above?",
        tuple(vocabulary[:3]),
        "all",
        50,
        "The three words that occur most often in the coded text are:",
    )

    def build(size: int) -> Draft:
        total = (size + _FEWEST_CODED) * 6 / pi**2
        words = []
        for rank, word in enumerate([_DOTS, *vocabulary], start=1):
            words += [word] * int(total / rank**2)
        Random(order).shuffle(words)
        instruction = "Below is a text of coded words. Keep in mind how often each occurs."
        return Draft(f"{instruction}\n\n{' '.join(words)}", (turn,))

    return build


def _other_than(words: list[str], random: Random) -> str:
    while (word := coded_word(random)) in words:
        pass
    return word


WORDS = (
    Task("common_words", "words", "the ten most common words of a list", _common),
    Task("frequent_words", "words", "the three most frequent words of a coded text", _frequent),
)
