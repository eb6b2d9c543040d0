"""Key-value retrieval from a JSON object ("Lost in the Middle", arXiv 2307.03172, section 3)."""

from __future__ import annotations

import json
from collections.abc import Callable

from mdkv_vllm.tasks.example import Turn
from mdkv_vllm.tasks.filling import place, series
from mdkv_vllm.tasks.task import Draft, Setting, Task
from mdkv_vllm.tasks.vocabulary import random_uuid


def _plan(setting: Setting) -> Callable[[int], Draft]:
    """The size is the number of other pairs."""
    random = setting.random

    def pair() -> tuple[str, str]:
        return random_uuid(random), random_uuid(random)

    asked = pair()
    others = series(pair)
    turn = Turn(
        f'Which value does the key "{asked[0]}" have in the JSON object above?',
        asked[1:],
        "all",
        64,
        f'The value of the key "{asked[0]}" is "',
    )

    def build(size: int) -> Draft:
        pairs = json.dumps(dict(place(asked, setting.depth, others(size))), indent=0)
        instruction = "Below is a JSON object. You will be asked for the value of one of its keys."
        return Draft(f"{instruction}\n\n{pairs}", (turn,), setting.depth)

    return build


LOOKUP = (Task("json_lookup", "lookup", "the value of one key in a JSON object", _plan),)
