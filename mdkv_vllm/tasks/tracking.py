"""Variable tracking: follow assignments from variable to variable (RULER, arXiv 2404.06654)."""

from __future__ import annotations

import string
from collections.abc import Callable
from random import Random

from mdkv_vllm.tasks.example import Turn
from mdkv_vllm.tasks.filling import hide
from mdkv_vllm.tasks.task import Draft, Setting, Task
from mdkv_vllm.tasks.vocabulary import distinct

_HOPS = 4
_INSTRUCTION = (
    "Assignments of variables are hidden in the text below. Follow them: there will be a "
    "question about the values of the variables after the text."
)


def _variable(random: Random) -> str:
    return "".join(random.choices(string.ascii_uppercase, k=5))


def _plan(setting: Setting) -> Callable[[int], Draft]:
    """One chain in the order of its hops; the size is tokens of haystack."""
    random = setting.random
    names = distinct(_variable, random, _HOPS + 1)
    value = str(random.randint(10_000, 99_999))
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    depths = sorted(random.random() for _ in chain)
    start = random.randrange(len(setting.haystack.sentences))
    turn = Turn(
        f"Find all variables that hold the value {value}, directly or by way of other "
        f"variables. There are {len(names)}.",
        tuple(names),
        "all",
        64,
        f"The {len(names)} variables that hold the value {value} are VAR",
    )

    def build(size: int) -> Draft:
        text = hide(zip(depths, chain, strict=True), setting.haystack.run(start, size))
        return Draft(f"{_INSTRUCTION}\n\n{text}", (turn,))

    return build


TRACKING = (
    Task("variable_tracking", "tracking", "all variables of a chain of assignments", _plan),
)
