"""Conversations: questions about one document, each after the one before has been answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mdkv_vllm.tasks.filling import hide
from mdkv_vllm.tasks.needles import NUMBER, announce, ask, needle
from mdkv_vllm.tasks.task import Draft, Setting, Task
from mdkv_vllm.tasks.vocabulary import digits, distinct, word_pair


def _plan(count: int, setting: Setting) -> Callable[[int], Draft]:
    """The needles lie evenly apart; the size is tokens of haystack."""
    random = setting.random
    keys, values = distinct(word_pair, random, count), distinct(digits, random, count)
    later = [(setting.depth + number / count) % 1 for number in range(1, count)]
    needles = [
        (depth, needle(NUMBER, key, value))
        for depth, key, value in zip([setting.depth, *later], keys, values, strict=True)
    ]
    turns = tuple(ask(NUMBER, [key], [value]) for key, value in zip(keys, values, strict=True))
    start = random.randrange(len(setting.haystack.sentences))

    def build(size: int) -> Draft:
        text = hide(needles, setting.haystack.run(start, size))
        return Draft(announce(NUMBER, text), turns, setting.depth)

    return build


FOLLOWUP = (
    Task(
        "followup",
        "followup",
        "two numbers of one document, asked for one after another",
        partial(_plan, 2),
    ),
    Task(
        "followup_5",
        "followup",
        "five numbers of one document, asked for one after another",
        partial(_plan, 5),
    ),
)
