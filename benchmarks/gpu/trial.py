"""One kernel call on random leases, with everything around it poisoned, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig
from mdkv_vllm.testing import leases

from . import reference
from .call import TRITON, Kernel, poison

TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
"""Largest relative error of an output vector by cache type, mostly of weights rounded to it."""
LSE_TOLERANCE = 2e-3
"""Largest absolute error of a log-sum-exp; queries are rounded again once rotated."""

NO_ROW = 10**6
"""Row of padding queries: reading it would be out of bounds."""


@dataclass(frozen=True)
class Errors:
    """What a call got wrong.

    Attributes:
        output: largest relative error of an output vector.
        lse: largest absolute error of a log-sum-exp.
        wrong: what is more than rounding, in words; empty where all is well.
    """

    output: float
    lse: float
    wrong: tuple[str, ...]


class Trial:
    """A case on a device, and the buffers of its calls, which stay where they are.

    Args:
        case: requests and their cache.
        queries: queries of every call.
        device: where to run.
        kernel: what is under test.
    """

    def __init__(
        self,
        case: leases.Case,
        queries: int,
        device: torch.device,
        kernel: Kernel = TRITON,
    ) -> None:
        model = case.model
        heads = model.kv_heads * model.group
        self.case, self.device, self.kernel = case, device, kernel
        self.kv_cache = case.kv_cache.clone().to(device)
        self.block_table = case.block_table.clone().to(device)
        self.leases = case.leases.clone().to(device)
        self.query_rows = torch.zeros(queries, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(queries, dtype=torch.int32, device=device)
        shape = (queries, heads, model.head_size)
        self.query = torch.zeros(shape, dtype=model.query_dtype, device=device)
        # A row more than the kernel may write, between any two.
        self.rows = torch.empty(queries, heads + 1, *shape[2:], dtype=model.query_dtype).to(device)
        self.output = self.rows[:, 1:]
        self.lse = torch.empty(shape[:2], device=device)
        self.scale = model.head_size**-0.5
        self.kernel = kernel.make(
            DecodeConfig(
                self.kv_cache, case.layout, model.group, case.calibrated, self.scale, queries,
                model.max_leases,
            )
        )  # fmt: skip

    def load(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy the case as it now is, fresh queries, and poison into the buffers."""
        case = self.case
        self.kv_cache.copy_(case.kv_cache)
        self.block_table.copy_(case.block_table)
        self.query_rows.copy_(torch.tensor(rows))
        self.lengths.copy_(torch.tensor(lengths))
        # Of numbers that the cache's type has too: the kernel multiplies in that type.
        self.query.copy_(case.query(*self.query.shape).to(case.model.dtype))
        self.rows.fill_(torch.nan)
        self.lse.fill_(torch.nan)
        poison(self.kernel)

    def launch(self, layer: int = 1) -> None:
        """Call the kernel."""
        batch = DecodeBatch(self.block_table, self.query_rows, self.lengths, self.leases)
        self.kernel.attend(self.query, layer, batch, self.output, self.lse)

    def expected(self, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """What a launch should write: float64 outputs and log-sum-exps."""
        return reference.mixed_decode(
            self.query,
            self.kv_cache,
            layer,
            self.case.layout,
            self.block_table,
            self.query_rows,
            self.lengths,
            self.leases,
            self.case.calibrated,
            self.scale,
        )

    def errors(self, layer: int = 1) -> Errors:
        """Compare what the last launch wrote, and see that it wrote nothing else."""
        case = self.case
        expected, expected_lse = self.expected(layer)
        wrong = []
        if not torch.equal(self.kv_cache.cpu().view(torch.uint8), case.kv_cache.view(torch.uint8)):
            wrong.append("the cache was written to")
        if not self.rows[:, 0].isnan().all():
            wrong.append("something beside the output was written to")
        seen = self.lengths > 0
        if self.output[~seen].count_nonzero() or not self.lse[~seen].isneginf().all():
            wrong.append("padding did not give zeros and minus infinity")
        distance = (self.output[seen].double() - expected[seen]).norm(dim=-1)
        error = distance / expected[seen].norm(dim=-1)
        lse_error = (self.lse[seen].double() - expected_lse[seen]).abs()
        limit = TOLERANCE[case.model.dtype]
        # Negated, so that a NaN is wrong.
        if not (error <= limit).all():
            wrong.append(f"relative error {worst(error):.1e} of {_place(error)}, over {limit:.0e}")
        if not (lse_error <= LSE_TOLERANCE).all():
            wrong.append(f"lse off by {worst(lse_error):.1e} in {_place(lse_error)}")
        return Errors(worst(error), worst(lse_error), tuple(wrong))


def worst(error: torch.Tensor) -> float:
    """The largest error; NaN where one is."""
    return float(error.max())


def _place(error: torch.Tensor) -> str:
    query, head = divmod(int(error.argmax()), error.shape[1])
    return f"query {query}, head {head}"
