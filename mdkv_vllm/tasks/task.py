"""What a task is: a plan that any size can be built from, and the fit to the length asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mdkv_vllm.tasks.example import Example, Turn
from mdkv_vllm.tasks.fitting import fit
from mdkv_vllm.tasks.text import Haystack


@dataclass(frozen=True)
class Setting:
    """What a plan may use.

    Attributes:
        random: the only source of chance, seeded for this one example.
        haystack: text to fill the prompt with.
        length: prompt tokens asked for.
        depth: where the answer is to lie in the text, 0 (beginning) to 1 (end).
    """

    random: Random
    haystack: Haystack
    length: int
    depth: float


@dataclass(frozen=True)
class Draft:
    """An example that has no name yet; attributes as in :class:`Example`."""

    context: str
    turns: tuple[Turn, ...]
    depth: float | None = None


Plan = Callable[[Setting], Callable[[int], Draft]]
"""Draws everything that is random, and returns a function from a size to a draft: a greater
size gives a longer context with the same questions. The unit of size is the task's own."""


@dataclass(frozen=True)
class Task:
    """A kind of example that can be made at any length.

    Attributes:
        name: unique name.
        family: tasks that test one ability share it.
        description: what is asked, in one line.
        plan: how an example is made.
    """

    name: str
    family: str
    description: str
    plan: Plan

    def make(self, random: Random, length: int, haystack: Haystack, index: int, of: int) -> Example:
        """Make one example of at most ``length`` tokens, short of it by 1 % or one line of text.

        Args:
            random: seeded for this example.
            length: prompt tokens asked for, chat template included.
            haystack: text to fill the prompt with.
            index: number of the example, ``0 .. of - 1``; depths are spread evenly over it.
            of: examples of this task and length.

        Raises:
            mdkv_vllm.tasks.errors.TaskError: the length is too short for the task.
        """
        depth = index / (of - 1) if of > 1 else 0.5
        build = self.plan(Setting(random, haystack, length, depth))

        def example(size: int) -> Example:
            draft = build(size)
            return Example(self.name, index, length, draft.context, draft.turns, draft.depth)

        return fit(example, haystack.count)
