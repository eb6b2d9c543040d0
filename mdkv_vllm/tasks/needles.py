"""Needle in a haystack: RULER's eight retrieval tasks (arXiv 2404.06654, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mdkv_vllm.tasks.example import Turn
from mdkv_vllm.tasks.filling import hide, place, series
from mdkv_vllm.tasks.task import Draft, Plan, Setting, Task
from mdkv_vllm.tasks.vocabulary import digits, distinct, random_uuid, word_pair

_GROUP = 4
"""Keys of ``multikey_1`` and ``multiquery``, values of ``multivalue``."""


@dataclass(frozen=True)
class Kind:
    """What is hidden.

    Attributes:
        noun: what the value is called.
        draw: makes a value.
        max_tokens: tokens of an answer with one value, with some to spare.
    """

    noun: str
    draw: Callable[[Random], str]
    max_tokens: int


NUMBER = Kind("number", digits, 32)
WORD = Kind("word", word_pair, 32)
UUID = Kind("UUID", random_uuid, 64)


def needle(kind: Kind, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"A special magic {kind.noun} for {key} is {value}."


def announce(kind: Kind, text: str) -> str:
    """A text that begins by saying what is hidden in it."""
    return (
        f"Special magic {kind.noun}s are hidden in the text below. Remember them: there will be "
        f"questions about them after the text.\n\n{text}"
    )


def ask(kind: Kind, keys: list[str], values: list[str]) -> Turn:
    """Ask for all values of some keys."""
    named = " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
    one = len(values) == 1
    what, verb = (kind.noun, "is") if one else (f"{kind.noun}s", "are")
    question = "What is the" if one else "What are all the"
    return Turn(
        f"{question} special magic {what} for {named} mentioned in the provided text?",
        tuple(values),
        "all",
        kind.max_tokens if one else len(values) * kind.max_tokens // 2,
        f"The special magic {what} for {named} mentioned in the provided text {verb}",
    )


def _single(kind: Kind, distractors: int = 0) -> Plan:
    """One needle is asked for; the distractors are needles with other keys."""

    def plan(setting: Setting) -> Callable[[int], Draft]:
        random = setting.random
        keys = distinct(word_pair, random, 1 + distractors)
        values = distinct(kind.draw, random, 1 + distractors)
        depths = [setting.depth, *(random.random() for _ in range(distractors))]
        turn = ask(kind, keys[:1], values[:1])
        return _hidden(setting, kind, (keys, values, depths), turn, setting.depth)

    return plan


def _several(keys_number: int, values_number: int) -> Plan:
    """Several needles, with one key or with a key each, are all asked for."""

    def plan(setting: Setting) -> Callable[[int], Draft]:
        random = setting.random
        keys = distinct(word_pair, random, keys_number)
        values = distinct(NUMBER.draw, random, values_number)
        depths = [random.random() for _ in values]
        turn = ask(NUMBER, keys, values)
        repeated = [keys[i % keys_number] for i in range(values_number)]
        return _hidden(setting, NUMBER, (repeated, values, depths), turn, None)

    return plan


def _hidden(
    setting: Setting,
    kind: Kind,
    needles: tuple[list[str], list[str], list[float]],
    turn: Turn,
    depth: float | None,
) -> Callable[[int], Draft]:
    """Drafts whose size is tokens of haystack.

    Args:
        setting: the example's setting.
        kind: what is hidden.
        needles: keys, values and depths.
        turn: the question.
        depth: depth of the needle that is asked for, if it is one.
    """
    start = setting.random.randrange(len(setting.haystack.sentences))
    placed = [(at, needle(kind, key, value)) for key, value, at in zip(*needles, strict=True)]

    def build(size: int) -> Draft:
        text = hide(placed, setting.haystack.run(start, size))
        return Draft(announce(kind, text), (turn,), depth)

    return build


def _only_needles(kind: Kind, draw_key: Callable[[Random], str]) -> Plan:
    """The whole text is needles, one to a line; the size is the number of distractors."""

    def plan(setting: Setting) -> Callable[[int], Draft]:
        random = setting.random
        key, value = draw_key(random), kind.draw(random)

        def distractor() -> str:
            other_key, other_value = key, value
            while other_key == key or other_value == value:
                other_key, other_value = draw_key(random), kind.draw(random)
            return needle(kind, other_key, other_value)

        distractors = series(distractor)
        asked, turn = needle(kind, key, value), ask(kind, [key], [value])

        def build(size: int) -> Draft:
            lines = place(asked, setting.depth, distractors(size))
            return Draft(announce(kind, "\n".join(lines)), (turn,), setting.depth)

        return build

    return plan


_FAMILY = "needles"
NEEDLES = (
    Task("needle_digits", _FAMILY, "a seven-digit number in running text", _single(NUMBER)),
    Task("needle_words", _FAMILY, "a pair of words in running text", _single(WORD)),
    Task("needle_uuid", _FAMILY, "a UUID in running text", _single(UUID)),
    Task(
        "multikey_1",
        _FAMILY,
        "one of four numbers with a key each, in running text",
        _single(NUMBER, distractors=_GROUP - 1),
    ),
    Task(
        "multikey_2",
        _FAMILY,
        "one number among nothing but numbers with keys",
        _only_needles(NUMBER, word_pair),
    ),
    Task(
        "multikey_3",
        _FAMILY,
        "one UUID among nothing but UUIDs with UUIDs as keys",
        _only_needles(UUID, random_uuid),
    ),
    Task("multivalue", _FAMILY, "all four numbers of one key", _several(1, _GROUP)),
    Task("multiquery", _FAMILY, "the numbers of four keys", _several(_GROUP, _GROUP)),
)
