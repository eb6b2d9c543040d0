"""A request as compression sees it, parsed once where a process first meets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mdkv_vllm.config import REQUEST_BUDGET, REQUEST_FIELDS, Budget, request_budget


@dataclass(frozen=True)
class CompressionRequest:
    """What decides whether and how a request's prompt is compressed.

    Attributes:
        request_id: vLLM's id.
        prompt_tokens: length of its prompt.
        budget: its own budget, None for the server's.
        generates: whether it is a text generation.
    """

    request_id: str
    prompt_tokens: int
    budget: Budget | None = None
    generates: bool = True

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
        return cls(request_id, prompt_tokens, request_budget(extra_args))


def without_compression(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """``vllm_xargs`` that keep a prompt uncompressed; those of other plugins stay as they are."""
    given = extra_args or {}
    others = {name: value for name, value in given.items() if name not in REQUEST_FIELDS}
    return others | {REQUEST_BUDGET: 1.0}
