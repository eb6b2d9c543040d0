"""Which request stands in which row of the batch: the one place that knows the model runners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from mdkv_vllm.config import Budget, request_budget


@dataclass(frozen=True)
class Request:
    """What compression needs to know of a request.

    Attributes:
        request_id: vLLM's id.
        prompt_tokens: length of its prompt.
        budget: its own budget, None for the server's.
        compressible: whether it is a text generation.
    """

    request_id: str
    prompt_tokens: int
    budget: Budget | None
    compressible: bool


class BatchOrder(Protocol):
    """Reads the running batch."""

    def request_ids(self, batch: CommonAttentionMetadata) -> list[str]:
        """Ids of the batch's requests in row order; rows beyond them are padding."""


class RunnerV1Order:
    """:class:`BatchOrder` of model runner V1."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401
        self._runner = runner

    def request_ids(self, batch: CommonAttentionMetadata) -> list[str]:
        """See :class:`BatchOrder`."""
        return self._runner.input_batch.req_ids


class RunnerV2Order:
    """:class:`BatchOrder` of model runner V2."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401
        self._runner = runner

    def request_ids(self, batch: CommonAttentionMetadata) -> list[str]:
        """See :class:`BatchOrder`."""
        assert batch.req_idx is not None
        names = self._runner.req_states.index_to_req_id
        return [names[int(index)] for index in batch.req_idx]


def batch_order(runner: Any, use_v2: bool) -> BatchOrder:  # noqa: ANN401
    """The adapter of a model runner."""
    return RunnerV2Order(runner) if use_v2 else RunnerV1Order(runner)


def new_requests(scheduled: SchedulerOutput) -> Iterator[Request]:
    """Requests that a step brings, those that runner V2 meets again after a preemption included."""
    for new in scheduled.scheduled_new_reqs:
        params = new.sampling_params
        budget = request_budget(params.extra_args) if params is not None else None
        yield Request(new.req_id, new.prompt_len, budget, params is not None)
