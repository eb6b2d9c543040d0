"""A request as compression sees it, parsed once where a process first meets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mdkv_vllm.config import REQUEST_BUDGET, REQUEST_FIELDS, Budget, request_budget
from mdkv_vllm.core.segment import SharedSegment

_SHARED = "mixeddim_shared_segments"
"""Key of ``extra_args`` in which the scheduler tells workers what a request shares. Clients may not
set it: like any unknown field of that kind it is refused at the door."""


@dataclass(frozen=True)
class CompressionRequest:
    """What decides whether and how a request's prompt is compressed.

    Attributes:
        request_id: vLLM's id.
        prompt_tokens: length of its prompt.
        budget: its own budget, None for the server's.
        generates: whether it is a text generation.
        shared: segments of others that it reads, from its first token on.
    """

    request_id: str
    prompt_tokens: int
    budget: Budget | None = None
    generates: bool = True
    shared: tuple[SharedSegment, ...] = ()

    @classmethod
    def parse(
        cls, request_id: str, prompt_tokens: int, extra_args: Mapping[str, Any] | None
    ) -> Self:
        """That of a text generation.

        Args:
            request_id: vLLM's id.
            prompt_tokens: length of its prompt.
            extra_args: its ``vllm_xargs``, those of other plugins among them.

        Raises:
            ConfigError: a ``mixeddim*`` field is unknown or out of range.
        """
        args = dict(extra_args or {})
        shared = tuple(SharedSegment(*blocks) for blocks in args.pop(_SHARED, ()))
        return cls(request_id, prompt_tokens, request_budget(args), shared=shared)


def with_shared(
    extra_args: Mapping[str, Any] | None, shared: tuple[SharedSegment, ...]
) -> dict[str, Any]:
    """``vllm_xargs`` that name the segments of others that a request reads; the rest as it is.

    Args:
        extra_args: those that the request came with, or got when it was scheduled before.
        shared: the segments.
    """
    others = {name: value for name, value in (extra_args or {}).items() if name != _SHARED}
    blocks = [[one.first_block, one.first_lease_block, one.end_block] for one in shared]
    return others | ({_SHARED: blocks} if shared else {})


def without_compression(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """``vllm_xargs`` that keep a prompt uncompressed; those of other plugins stay as they are."""
    given = extra_args or {}
    others = {name: value for name, value in given.items() if name not in REQUEST_FIELDS}
    return others | {REQUEST_BUDGET: 1.0}
