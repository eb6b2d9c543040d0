"""The requests that a worker holds, with what compression knows of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mdkv_vllm.core.plan import RequestPlan
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.policy import Policy
from mdkv_vllm.request import CompressionRequest


@dataclass
class HeldRequest:
    """A request, its segments so far, and their leases.

    Attributes:
        request: what compression was told of it.
        plan: its segments; None where it stays uncompressed.
        leases: of its compressed segments, in order, those of others that it reads first: first
            block and the one behind the last.
        windows: by segments that are not compressed yet, the queries captured so far, see
            :class:`.query_window.QueryWindow`.
        computed_tokens: that the scheduler counted when it scheduled the request last: those of
            the step before included, drafts only where they were accepted.
        blocks: int32 ``[blocks or fewer]``, ids of its first blocks, up to the last that a segment
            which may have ripened in its last step reads.
    """

    request: CompressionRequest
    plan: RequestPlan | None
    leases: list[tuple[int, int]] = field(default_factory=list)
    windows: dict[Segment, torch.Tensor] = field(default_factory=dict)
    computed_tokens: int = 0
    blocks: torch.Tensor | None = None
    _ripe: int = 0
    _segments: Iterator[Segment] | None = None
    _known: list[Segment] = field(default_factory=list)

    def take_ripe(self) -> Iterator[Segment]:
        """Segments that computed tokens have made ripe since this was called last."""
        while (segment := self._segment(self._ripe)) and segment.ripe_at <= self.computed_tokens:
            self._ripe += 1
            yield segment

    def unripe(self, before_token: int) -> Iterator[Segment]:
        """Segments that are not ripe yet and whose window begins before a token."""
        number = self._ripe
        while (segment := self._segment(number)) and segment.window_start < before_token:
            yield segment
            number += 1

    def _segment(self, number: int) -> Segment | None:
        if self.plan is None:
            return None
        if self._segments is None:
            self._segments = self.plan.segments()
        while len(self._known) <= number:
            segment = next(self._segments, None)
            if segment is None:
                return None
            self._known.append(segment)
        return self._known[number]


class RequestTable:
    """Requests by their ids.

    Args:
        policy: plans their segments.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._held: dict[str, HeldRequest] = {}

    def __getitem__(self, request_id: str) -> HeldRequest:
        return self._held[request_id]

    def add(self, new: Iterable[CompressionRequest]) -> None:
        """Take in requests, those that come again after a preemption included."""
        for request in new:
            plan = self._policy.plan_request(request)
            planned = plan if isinstance(plan, RequestPlan) else None
            shared = [one.lease for one in request.shared]
            self._held[request.request_id] = HeldRequest(request, planned, shared)

    def count(self, computed_tokens: Mapping[str, int]) -> list[HeldRequest]:
        """Take over the scheduler's counts of requests that it schedules again; these requests."""
        counted = [self._held[request_id] for request_id in computed_tokens]
        for held, tokens in zip(counted, computed_tokens.values(), strict=True):
            held.computed_tokens = tokens
        return counted

    def remove(self, finished: set[str], preempted: set[str]) -> None:
        """Forget requests that ended, and the leases of those that lost their blocks."""
        for request_id in finished:
            self._held.pop(request_id, None)
        for request_id in preempted & self._held.keys():
            held = self._held[request_id]
            # It comes again without the leases of others: see MixedDimManager.
            self.add([replace(held.request, shared=())])

    def describe(self) -> list[dict[str, Any]]:
        """Every request, without its content."""
        return [
            {
                "request_id": request_id,
                "prompt_tokens": held.request.prompt_tokens,
                "planned_share": held.plan.kept_share if held.plan else 1.0,
                "computed_tokens": held.computed_tokens,
                "compressed_segments": len(held.leases),
            }
            for request_id, held in self._held.items()
        ]
