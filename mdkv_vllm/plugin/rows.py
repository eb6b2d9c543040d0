"""Which request stands in which row of the batch: the one place that knows the model runner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from mdkv_vllm.config import Budget, request_budget


@dataclass(frozen=True)
class Row:
    """One request of the batch.

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


class BatchRows(Protocol):
    """Reads the running batch."""

    def rows(self) -> Iterator[Row]:
        """The batch's requests in row order."""


class RunnerV1Rows:
    """:class:`BatchRows` of vLLM's model runner V1."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401
        self._runner = runner

    def rows(self) -> Iterator[Row]:
        """The batch's requests in row order."""
        for request_id in self._runner.input_batch.req_ids:
            state = self._runner.requests[request_id]
            params = state.sampling_params
            budget = request_budget(params.extra_args) if params is not None else None
            yield Row(request_id, state.num_prompt_tokens, budget, params is not None)
