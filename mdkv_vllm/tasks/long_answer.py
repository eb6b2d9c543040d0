"""A long answer about a long document: how soon it departs from full attention's."""

from __future__ import annotations

from collections.abc import Callable

from mdkv_vllm.tasks.example import AGREEMENT, Turn
from mdkv_vllm.tasks.task import Draft, Setting, Task

ANSWER_TOKENS = 256
_TURN = Turn("Summarize the text above in detail.", (), AGREEMENT, ANSWER_TOKENS)


def _plan(setting: Setting) -> Callable[[int], Draft]:
    """The size is tokens of haystack."""
    start = setting.random.randrange(len(setting.haystack.sentences))

    def build(size: int) -> Draft:
        text = " ".join(setting.haystack.run(start, size))
        instruction = "Read the text below. You will be asked to summarize it."
        return Draft(f"{instruction}\n\n{text}", (_TURN,))

    return build


LONG_ANSWER = (
    Task("long_answer", "long_answer", "a summary, compared with full attention's", _plan),
)
