"""The task set: examples of any length from a haystack, a token counter and a seed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from random import Random

from mdkv_vllm.tasks.classification import CLASSIFICATION
from mdkv_vllm.tasks.errors import TaskError
from mdkv_vllm.tasks.example import Example
from mdkv_vllm.tasks.followup import FOLLOWUP
from mdkv_vllm.tasks.generated import GENERATED
from mdkv_vllm.tasks.long_answer import LONG_ANSWER
from mdkv_vllm.tasks.lookup import LOOKUP
from mdkv_vllm.tasks.needles import NEEDLES
from mdkv_vllm.tasks.task import Task
from mdkv_vllm.tasks.text import Haystack
from mdkv_vllm.tasks.tracking import TRACKING
from mdkv_vllm.tasks.words import WORDS

__all__ = ["SEED", "TASKS", "Task", "TaskError", "generate"]

SEED = 0
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *NEEDLES,
        *TRACKING,
        *WORDS,
        *LOOKUP,
        *CLASSIFICATION,
        *FOLLOWUP,
        *LONG_ANSWER,
        *GENERATED,
    )
}
"""Every task that can be generated, by name."""


def generate(
    names: Sequence[str],
    lengths: Sequence[int],
    per_task: int,
    haystack: Haystack,
    seed: int = SEED,
) -> Iterator[Example]:
    """Make examples, task by task and length by length.

    An example depends on its task, length and index, on ``per_task`` (which spreads the
    depths), the haystack with its token counter, and the seed; not on what else is asked for.

    Args:
        names: tasks, out of :data:`TASKS`.
        lengths: prompt tokens asked for, chat template included.
        per_task: examples of each task and length.
        haystack: text to fill prompts with, and the token counter.
        seed: another seed gives other examples.

    Raises:
        TaskError: a name is unknown, a number is not positive, or a length is too short.
    """
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TaskError(f"task {name!r} is unknown{hint} (allowed: {', '.join(TASKS)})")
    for field, value in [("per_task", per_task), *(("length", length) for length in lengths)]:
        if value < 1:
            raise TaskError(f"{field} is {value}; allowed are whole numbers from 1 up")
    return (
        # A text as seed is hashed by Random itself, alike in every process.
        TASKS[name].make(
            Random(f"{seed}/{name}/{length}/{index}"), length, haystack, index, per_task
        )
        for name in names
        for length in lengths
        for index in range(per_task)
    )
