"""A request on its way: what a method holds of its tokens, and how that goes on as more come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch

from mdkv_vllm.models.held_cache import HeldCache
from mdkv_vllm.models.in_process import InProcessModel

T = TypeVar("T")


@dataclass(frozen=True)
class HeldRequest:
    """A request whose later tokens stay at full size.

    Attributes:
        model: what computes its tokens.
        cache: what is held of those computed.
        logits: float32 ``[vocabulary]`` after the last of them.
    """

    model: InProcessModel
    cache: HeldCache
    logits: torch.Tensor

    def only_grows_by(self, tokens: int) -> bool:
        """Whether what is held now stays as it is while so many more tokens are computed."""
        del tokens
        return True

    def extend(self, token_ids: Sequence[int]) -> tuple[Self, torch.Tensor]:
        """Compute more tokens.

        Args:
            token_ids: the tokens, one or more.

        Returns:
            The request with them, and logits after each, float32 ``[tokens, vocabulary]``.
        """
        more = self.model.extend(self.cache, token_ids)
        return replace(self, cache=more.cache, logits=more.logits[-1]), more.logits


def follow(requests: Sequence[HeldRequest], token_ids: Sequence[int]) -> list[torch.Tensor]:
    """Logits before the first and after each of the tokens that all requests go on with.

    Args:
        requests: of equally many tokens; those that only grow are computed together.
        token_ids: the tokens.

    Returns:
        Per request float32 ``[1 + tokens, vocabulary]``.
    """
    first = [request.logits.unsqueeze(0) for request in requests]
    if not token_ids:
        return first

    def together(steady: Sequence[HeldRequest]) -> Sequence[torch.Tensor]:
        return list(steady[0].model.follow([one.cache for one in steady], token_ids))

    later = _each(requests, len(token_ids), together, lambda one: one.extend(token_ids)[1])
    return [torch.cat(pair) for pair in zip(first, later, strict=True)]


def generate(requests: Sequence[HeldRequest], max_tokens: int) -> list[list[int]]:
    """Greedy answers, without the token that ends them.

    Args:
        requests: of equally many tokens; those that only grow are computed together.
        max_tokens: of an answer at most.
    """

    def together(steady: Sequence[HeldRequest]) -> Sequence[list[int]]:
        logits, caches = [one.logits for one in steady], [one.cache for one in steady]
        return steady[0].model.go_on(logits, caches, max_tokens)

    return _each(requests, max_tokens, together, lambda one: _generate(one, max_tokens))


def _each(
    requests: Sequence[HeldRequest],
    tokens: int,
    together: Callable[[Sequence[HeldRequest]], Sequence[T]],
    alone: Callable[[HeldRequest], T],
) -> list[T]:
    """What comes of each request: of those that only grow by so many tokens in one call."""
    steady = [request for request in requests if request.only_grows_by(tokens)]
    found = iter(together(steady) if steady else ())
    return [
        next(found) if request.only_grows_by(tokens) else alone(request) for request in requests
    ]


def _generate(request: HeldRequest, max_tokens: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < max_tokens:
        token = int(request.logits.argmax())
        if token in request.model.stop_tokens:
            break
        answer.append(token)
        request, _ = request.extend([token])
    return answer
