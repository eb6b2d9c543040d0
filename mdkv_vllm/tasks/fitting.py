"""Fit an example to the length asked for, counting the tokens of as few candidates as possible."""

from __future__ import annotations

from collections.abc import Callable

from mdkv_vllm.tasks.errors import TaskError
from mdkv_vllm.tasks.example import Example
from mdkv_vllm.tasks.text import TokenCount

OVERHEAD_TOKENS = 60
"""Set aside for the chat template: special tokens, role names and its own system message."""
_SLACK = 0.005
_FIRST_STEP = 16
_MAX_GROWTH = 16


def prompt_tokens(example: Example, count: TokenCount) -> int:
    """Tokens of an example's last prompt: context, all questions, answers before, template.

    Args:
        example: the example.
        count: counts the tokens of a string.
    """
    asked = [f"{turn.question}\n{turn.answer_prefix}" for turn in example.turns]
    answered = sum(turn.max_tokens for turn in example.turns[:-1])
    return count("\n\n".join([example.context, *asked])) + answered + OVERHEAD_TOKENS


def fit(build: Callable[[int], Example], count: TokenCount) -> Example:
    """The largest example that is no longer than it was asked to be.

    The size is found by interpolation between one that fits and one that does not, and the
    search ends within 0.5 % of the length, or when no size lies between.

    Args:
        build: makes an example from a size, from 1; tokens grow about linearly with it.
        count: counts the tokens of a string.

    Raises:
        TaskError: even size 1 is too long.
    """
    best = build(1)
    first = best_tokens = prompt_tokens(best, count)
    if first > best.length:
        raise TaskError(
            f"length is {best.length}; task {best.task} needs {first} tokens or more with this "
            "tokenizer"
        )
    target = best.length * (1 - _SLACK / 2)
    low, high, high_tokens = 1, 0, 0
    size = low + _FIRST_STEP
    while best_tokens < best.length * (1 - _SLACK) and (not high or high - low > 1):
        example = build(size)
        tokens = prompt_tokens(example, count)
        if tokens <= example.length:
            best, best_tokens, low = example, tokens, size
        else:
            high, high_tokens = size, tokens
        if high:
            share = (target - best_tokens) / (high_tokens - best_tokens)
            size = min(max(int(low + share * (high - low)), low + 1), high - 1)
        else:
            slope = (best_tokens - first) / (low - 1) or 1 / _MAX_GROWTH
            size = min(low + 1 + int((target - best_tokens) / slope), low * _MAX_GROWTH)
    return best
