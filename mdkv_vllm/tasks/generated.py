"""Long answers that are given, not generated, so that every method reads the same one.

What counts is how it is read while it is held: as it goes on, and when something that was said at
its beginning is needed at its end, as in a chain of thought.
"""

from __future__ import annotations

from collections.abc import Callable

from mdkv_vllm.tasks.example import AGREEMENT, Turn
from mdkv_vllm.tasks.needles import NUMBER, needle
from mdkv_vllm.tasks.task import Draft, Setting, Task
from mdkv_vllm.tasks.vocabulary import distinct, word_pair

REPLY_TOKENS = 1536
"""Of a reply that goes on with the text."""
REASONING_TOKENS = 1200
"""Between something being said and its being needed."""
_KEYS = 2


def _reply(setting: Setting) -> Callable[[int], Draft]:
    """The text itself goes on; the size is tokens of haystack in the prompt."""
    start = setting.random.randrange(len(setting.haystack.sentences))

    def build(size: int) -> Draft:
        before = setting.haystack.run(start, size)
        later = setting.haystack.run(start + len(before), REPLY_TOKENS)
        turn = Turn("Write on.", (), AGREEMENT, 1, given=" ".join(later))
        return Draft(f"Read the beginning of a text.\n\n{' '.join(before)}", (turn,))

    return build


def _recall(setting: Setting) -> Callable[[int], Draft]:
    """One of two numbers is needed that the answer began with; the size is tokens of haystack."""
    random = setting.random
    keys = distinct(word_pair, random, _KEYS)
    values = distinct(NUMBER.draw, random, _KEYS)
    said = [needle(NUMBER, key, value) for key, value in zip(keys, values, strict=True)]
    asked = random.randrange(_KEYS)
    start = random.randrange(len(setting.haystack.sentences))

    def build(size: int) -> Draft:
        before = setting.haystack.run(start, size)
        later = setting.haystack.run(start + len(before), REASONING_TOKENS)
        turn = Turn(
            "Choose the special magic numbers. Then write on. In the end say again which number "
            f"you chose for {keys[asked]}.",
            (values[asked],),
            "all",
            16,
            given=f"I choose these numbers. {' '.join([*said, *later])} As I said in the "
            f"beginning, the special magic number for {keys[asked]} is",
        )
        asking = f"Read the beginning of a text. You will choose numbers for {' and '.join(keys)}."
        return Draft(f"{asking}\n\n{' '.join(before)}", (turn,))

    return build


GENERATED = (
    Task("long_reply", "long_reply", "a text that goes on, compared with full attention", _reply),
    Task("recall", "recall", "a number that the answer itself began with", _recall),
)
