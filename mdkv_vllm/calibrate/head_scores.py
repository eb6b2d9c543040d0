"""Which heads find what a question asks for: HeadKV's retrieval-reasoning scores.

HeadKV-R2 (arXiv 2410.19258): hide an answer in a long text together with something
that could be mistaken for it, let the model answer, and while it does credit each query head with
the attention that its strongest positions give to the hidden answer. In place of HeadKV's
questions about two people's preferences, ours ask for a number with a key, which also small models
can answer: half of them with nothing else hidden, half among three more numbers with other keys
(RULER's single and multi-key needle). The step that makes the answer's first token belongs to
prefill and is not credited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mdkv_vllm.models.held_cache import full_cache
from mdkv_vllm.models.in_process import InProcessModel
from mdkv_vllm.tasks import generate
from mdkv_vllm.tasks.example import Example, Turn, score
from mdkv_vllm.tasks.prompt import prompt_text
from mdkv_vllm.tasks.text import Haystack

TASKS = ("needle_digits", "multikey_1")
MIN_ANSWERED = 8
"""Fewer right answers than this say too little about the heads."""
_SEED = 7001
"""Far from the seeds that ``mdkv eval`` is used with, so that its examples are others."""
_WINDOW = 1


@dataclass(frozen=True)
class HeadScores:
    """What was found.

    Attributes:
        scores: float32 ``[layers, query_heads]``, mean over the questions answered right.
        answered: questions answered right.
        asked: questions asked.
        tokens: prompt tokens of the questions answered right.
    """

    scores: torch.Tensor
    answered: int
    asked: int
    tokens: int


def questions(haystack: Haystack, lengths: list[int], per_length: int) -> Iterator[Example]:
    """Needles with and without distractors, at every length, at depths spread over the text."""
    for length in lengths:
        for task in TASKS:
            yield from generate([task], [length], per_length, haystack, _SEED)


def measure_head_scores(
    model: InProcessModel,
    examples: list[Example],
    advance: Callable[[], None] = lambda: None,
) -> HeadScores:
    """Score every query head.

    Args:
        model: the model.
        examples: questions whose answer is one string of the text.
        advance: told after every question.

    Raises:
        ValueError: the model answers too few of them.
    """
    total: torch.Tensor | None = None
    answered = tokens = 0
    for example in examples:
        found = _score_question(model, example)
        if found is not None:
            total = found if total is None else total + found
            answered += 1
            tokens += example.length
        advance()
    if total is None or answered < MIN_ANSWERED:
        raise ValueError(
            f"the model answers {answered} of {len(examples)} questions; at least {MIN_ANSWERED} "
            "right answers are needed: give it more (--per-length), or shorter texts (--lengths)"
        )
    return HeadScores(total / answered, answered, len(examples), tokens)


def _score_question(model: InProcessModel, example: Example) -> torch.Tensor | None:
    """Scores ``[layers, query_heads]`` from one question; None where it is answered wrong."""
    turn = example.turns[0]
    prompt, hidden = locate(model.tokenizer, prompt_text(model.tokenizer, example, 0), turn)
    prefill = model.prefill(prompt, _WINDOW)
    full = full_cache(prefill)
    answer = model.generate(prefill, [full], turn.max_tokens)[0]
    if score(turn, model.tokenizer.decode(answer)) < 1:
        return None
    layers: dict[int, torch.Tensor] = {}

    def watch(layer: int, weights: torch.Tensor) -> None:
        layers[layer] = credit(weights[0], hidden)

    model.follow([full], answer, watch)
    return torch.stack([layers[layer] for layer in range(model.num_layers)]).cpu()


def locate(tokenizer: Any, text: str, turn: Turn) -> tuple[list[int], torch.Tensor]:  # noqa: ANN401
    """Tokens of a prompt, and the places of those that spell its first answer (int64)."""
    start = text.index(turn.answers[0])
    stop = start + len(turn.answers[0])
    special = tokenizer.chat_template is None
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    places = enumerate(encoded.offset_mapping)
    hidden = [at for at, (first, last) in places if first < stop and last > start]
    return list(encoded.input_ids), torch.tensor(hidden)


def credit(weights: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Credit for looking at the hidden answer, summed over decoding steps.

    ``sum_{i in top-k, i in answer} a_i / k`` with ``k`` the answer's length in tokens.

    Args:
        weights: attention to the prompt, float32 ``[query_heads, steps, prompt_tokens]``.
        hidden: positions of the answer, int64 ``[k]``.

    Returns:
        float32 ``[query_heads]``.
    """
    top = weights.topk(len(hidden), dim=-1)
    inside = torch.isin(top.indices, hidden.to(top.indices.device))
    return (top.values * inside).sum((1, 2)) / len(hidden)
