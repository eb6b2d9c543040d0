"""Which request stands in which row of the batch: the one place that knows the model runners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from mdkv_vllm.request import CompressionRequest


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


def computed_tokens(scheduled: SchedulerOutput) -> dict[str, int]:
    """Tokens of the requests that a step goes on with, by their ids, computed before it.

    Drafts of the step before are among them where they were accepted: the scheduler knows, because
    it does not run ahead of them (see :mod:`.validation`).
    """
    running = scheduled.scheduled_cached_reqs
    return dict(zip(running.req_ids, running.num_computed_tokens, strict=True))


def new_requests(scheduled: SchedulerOutput) -> Iterator[CompressionRequest]:
    """Requests that a step brings, those that runner V2 meets again after a preemption included."""
    for new in scheduled.scheduled_new_reqs:
        if new.sampling_params is None:
            yield CompressionRequest(new.req_id, new.prompt_len, generates=False)
        else:
            yield CompressionRequest.parse(
                new.req_id, new.prompt_len, new.sampling_params.extra_args
            )
