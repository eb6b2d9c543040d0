"""Many methods on the same prompt in one process: prefill once, then compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch

from mdkv_vllm.eval.held_request import HeldRequest, follow, generate
from mdkv_vllm.eval.methods import Method, begin
from mdkv_vllm.eval.rows import Row
from mdkv_vllm.models.held_cache import full_cache
from mdkv_vllm.models.in_process import InProcessModel
from mdkv_vllm.tasks.example import AGREEMENT, Example
from mdkv_vllm.tasks.prompt import prompt_text, token_ids

ROWS_AT_ONCE = 8
"""Caches decoded together; bounds memory."""


@dataclass(frozen=True)
class Trial:
    """A method at a budget."""

    method: Method
    budget: float


class Distances(NamedTuple):
    """How far a method departs from full attention, token by token."""

    divergence: torch.Tensor
    """float32 ``[tokens]``, nats."""
    agreement: torch.Tensor
    """float32 ``[tokens]``: 1 where the first choice is full attention's."""

    @classmethod
    def between(cls, expected: torch.Tensor, found: torch.Tensor) -> Distances:
        """Compare logits, float32 ``[tokens, vocabulary]``, full attention's first."""
        wanted = expected.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1)
        return cls(divergence, (found.argmax(-1) == expected.argmax(-1)).float())

    @property
    def means(self) -> tuple[float, float]:
        """Mean divergence and agreement."""
        return round(float(self.divergence.mean()), 6), round(float(self.agreement.mean()), 6)

    @property
    def quarters(self) -> tuple[tuple[float, float], ...]:
        """The means of each quarter."""
        pairs = zip(self.divergence.chunk(4), self.agreement.chunk(4), strict=True)
        return tuple(Distances(*pair).means for pair in pairs)


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
    prompts = [
        token_ids(model.tokenizer, prompt_text(model.tokenizer, example, index))
        for index in range(turn + 1)
    ]
    earlier = [_in_common(prompt, prompts[-1]) for prompt in prompts[:-1]]
    prefill = model.prefill(prompts[-1])
    given = model.tokenizer(asked.given, add_special_tokens=False).input_ids
    full, heard = _hear(HeldRequest(model, full_cache(prefill), prefill.logits), given)
    answer = generate([full], asked.max_tokens)[0]
    expected = follow([full], answer)[0]
    rows: list[Row] = []
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        some = wanted[start : start + ROWS_AT_ONCE]
        requests, shares, along = [], [], []
        for trial in some:
            request = begin(trial.method, model, prefill, trial.budget, earlier)
            shares.append(round(request.cache.share, 5))
            request, logits = _hear(request, given)
            requests.append(request)
            along.append(Distances.between(heard, logits) if given else None)
        # Where only agreement counts nothing has to be said.
        answers = generate(requests, asked.max_tokens) if asked.answers else [[]] * len(some)
        found = follow(requests, answer)
        for trial, request, share, gone, tokens, logits in zip(
            some, requests, shares, along, answers, found, strict=True
        ):
            only_given = asked.scoring == AGREEMENT and gone is not None
            distances = gone if only_given else Distances.between(expected, logits)
            divergence, agreement = distances.means
            rows.append(
                Row.of(
                    example,
                    turn,
                    method=trial.method.name,
                    budget=trial.budget,
                    share=share,
                    divergence=divergence,
                    agreement=agreement,
                    answer=model.tokenizer.decode(tokens, skip_special_tokens=True),
                    end_share=round(request.cache.share, 5) if gone else None,
                    quarters=gone.quarters if gone else (),
                )
            )
    return rows


def _in_common(prompt: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    pairs = zip(prompt, other, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _hear(request: HeldRequest, given: list[int]) -> tuple[HeldRequest, torch.Tensor]:
    """A request that has gone on with given tokens, and logits before each of them."""
    if not given:
        return request, request.logits.unsqueeze(0)
    later, logits = request.extend(given)
    return later, torch.cat((request.logits.unsqueeze(0), logits[:-1]))
