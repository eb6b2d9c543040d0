"""Many methods on the same prompt in one process: prefill once, then compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mdkv_vllm.eval.methods import Method
from mdkv_vllm.eval.rows import Row
from mdkv_vllm.models.held_cache import HeldCache, Prefill, full_cache
from mdkv_vllm.models.in_process import InProcessModel
from mdkv_vllm.tasks.example import Example, Turn
from mdkv_vllm.tasks.prompt import prompt_text, token_ids

WINDOW = 64
"""Queries kept of each prompt; no method has a larger observation window."""
ROWS_AT_ONCE = 8
"""Caches decoded together; bounds memory."""


@dataclass(frozen=True)
class Trial:
    """A method at a budget."""

    method: Method
    budget: float


def trials(methods: Iterable[Method], budgets: Sequence[float]) -> list[Trial]:
    """Every method at every budget, or at the sizes it has."""
    return [Trial(m, b) for m in methods for b in (m.fixed_shares or tuple(budgets))]


def measure(
    model: InProcessModel, example: Example, turn: int, wanted: Sequence[Trial]
) -> list[Row]:
    """Answer one turn with every method.

    Args:
        model: the model.
        example: the example.
        turn: index of the turn.
        wanted: methods and budgets.
    """
    asked = example.turns[turn]
    prompt = token_ids(model.tokenizer, prompt_text(model.tokenizer, example, turn))
    prefill = model.prefill(prompt, WINDOW)
    reference = full_cache(prefill)
    answer = model.generate(prefill, [reference], asked.max_tokens)[0]
    logits = model.follow(prefill, [reference], answer)[0] if answer else None
    rows: list[Row] = []
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        some = wanted[start : start + ROWS_AT_ONCE]
        caches = [trial.method.apply(model, prefill, trial.budget) for trial in some]
        answers = _answers(model, prefill, caches, asked)
        distances = _distances(model, prefill, caches, answer, logits)
        for trial, cache, tokens, (divergence, agreement) in zip(
            some, caches, answers, distances, strict=True
        ):
            text = model.tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append(
                Row.of(
                    example,
                    turn,
                    method=trial.method.name,
                    budget=trial.budget,
                    share=round(cache.share, 5),
                    divergence=divergence,
                    agreement=agreement,
                    answer=text,
                )
            )
    return rows


def _answers(
    model: InProcessModel, prefill: Prefill, caches: Sequence[HeldCache], asked: Turn
) -> list[list[int]]:
    """Generated tokens; none where only agreement counts."""
    if not asked.answers:
        return [[] for _ in caches]
    return model.generate(prefill, caches, asked.max_tokens)


def _distances(
    model: InProcessModel,
    prefill: Prefill,
    caches: Sequence[HeldCache],
    answer: Sequence[int],
    reference: torch.Tensor | None,
) -> list[tuple[float | None, float | None]]:
    """Divergence and agreement of each cache along full attention's answer.

    The answer's first token comes from prefill, before any compression: what is compared is
    the distribution after it, and so on up to the last.
    """
    if reference is None:
        return [(None, None) for _ in caches]
    expected = reference.log_softmax(-1)
    found = model.follow(prefill, caches, answer)
    divergence = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean(-1)
    agreement = (found.argmax(-1) == reference.argmax(-1)).float().mean(-1)
    pairs = zip(divergence.tolist(), agreement.tolist(), strict=True)
    return [(round(kl, 6), round(same, 6)) for kl, same in pairs]
