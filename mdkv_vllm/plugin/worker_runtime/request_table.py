"""The requests that a worker holds, with what compression knows of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.policy import Policy
from mdkv_vllm.request import CompressionRequest


@dataclass
class Prompt:
    """A prompt on its way to compression, or compressed.

    Attributes:
        request: whose it is.
        plan: of its lease; None where it stays uncompressed.
        window: queries captured so far, see :class:`.query_window.QueryWindow`.
    """

    request: CompressionRequest
    plan: LeasePlan | None
    window: torch.Tensor | None = None


class RequestTable:
    """Prompts by their request's id.

    Args:
        policy: plans their leases.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._prompts: dict[str, Prompt] = {}

    def __getitem__(self, request_id: str) -> Prompt:
        return self._prompts[request_id]

    def add(self, new: Iterable[CompressionRequest]) -> None:
        """Take in requests, those that come again after a preemption included."""
        for request in new:
            plan = self._policy.plan_request(request)
            held = plan if isinstance(plan, LeasePlan) else None
            self._prompts[request.request_id] = Prompt(request, held)

    def remove(self, finished: set[str], preempted: set[str]) -> None:
        """Forget requests that ended, and the windows of those that lost their blocks."""
        for request_id in finished:
            self._prompts.pop(request_id, None)
        for request_id in preempted & self._prompts.keys():
            self._prompts[request_id].window = None

    def describe(self) -> list[dict[str, Any]]:
        """Every request, without its content."""
        return [
            {
                "request_id": request_id,
                "prompt_tokens": prompt.request.prompt_tokens,
                "planned_share": prompt.plan.kept_share if prompt.plan else 1.0,
            }
            for request_id, prompt in self._prompts.items()
        ]
