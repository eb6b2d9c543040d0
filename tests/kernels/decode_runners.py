"""Decode kernels under test, each run where it can be: here, or in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES, DecodeBatch, DecodeConfig
from mdkv_vllm.kernels.registry import DECODE
from mdkv_vllm.testing import leases
from mdkv_vllm.testing.leases import Model, Request

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def attend(name, options, config, query, layer, batch, output, lse):
    """Attend once, scratch memory poisoned; what was written, the cache, and the kept queries."""
    kernel = _made(name, config, options)
    for tensor in kernel.scratch():
        tensor.view(torch.uint8).fill_(0xFF)
    recent = torch.full(query.shape, torch.nan, dtype=query.dtype)
    kernel.attend(query, layer, batch, output, lse, recent)
    return output, lse, config.kv_cache, recent


def _made(name: str, config: DecodeConfig, options: dict[str, Any]):
    if name == "triton":
        from mdkv_vllm.kernels.triton.decode import TritonDecode

        return TritonDecode(config, options.get("programs", 24))
    if name == "cuda":
        from cuda_host.process import configure

        from mdkv_vllm.kernels.cuda.decode import CudaDecode

        configure(config.kv_cache, options.get("order", "threads backwards"))
        return CudaDecode(config, options.get("programs", 24))
    return DECODE[name](config)


@dataclass(frozen=True)
class Runner:
    """An implementation and how closely it has to agree with the reference.

    Attributes:
        name: key of ``registry.DECODE``.
        process: where it runs; here if None.
        errors: largest relative error of an output vector, by type.
        by_cache: whether the cache's type bounds the error, because the kernel multiplies in it;
            queries then are numbers which that type has too.
        lse_error: largest absolute error of a log-sum-exp.
        dtypes: of caches.
        head_sizes: that it is tried with.
    """

    name: str
    process: ProcessPoolExecutor | None
    errors: dict[torch.dtype, float]
    by_cache: bool
    lse_error: float
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16, FP32)
    head_sizes: tuple[int, ...] = (64,)
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self, *arguments, **options):
        if self.process is None:
            return attend(self.name, options, *arguments)
        return self.process.submit(attend, self.name, options, *arguments).result()


ROUNDED = {FP32: 2e-6, FP16: 6e-4, BF16: 8e-3}
"""Errors mostly of weights rounded to the type. (Triton's interpreter cuts bfloat16 off where a GPU
rounds.)"""
CODED = {FP32: 3e-4, FP16: 1e-3, BF16: 6e-3}
"""Codes may be scored and summed with 15-bit weights."""


def reference() -> Runner:
    exact = {FP32: 1e-6, FP16: 6e-4, BF16: 5e-3}
    return Runner("reference", None, exact, False, 1e-6)


def cpu() -> Runner:
    sizes = (8, 32, 40, 64, 72, 80, 96, 112, 128, 256, 512)
    return Runner("cpu", None, CODED, False, 2e-4, head_sizes=sizes)


def triton(process: ProcessPoolExecutor) -> Runner:
    # In bfloat16, queries rotated into a basis are rounded again.
    return Runner("triton", process, ROUNDED, True, 2e-3, head_sizes=GPU_HEAD_SIZES)


def cuda(process: ProcessPoolExecutor) -> Runner:
    return Runner("cuda", process, ROUNDED, True, 2e-3, (BF16, FP16), GPU_HEAD_SIZES)


class Case(leases.Case):
    """Random leases that a runner's kernel attends to."""

    def __init__(self, runner: Runner, model: Model, requests: list[Request], seed=0, **options):
        super().__init__(model, requests, seed)
        self.runner, self.options, self.lse_error = runner, options, runner.lse_error

    def decode(self, query, layer, query_rows, lengths, scale, output, lse):
        config = DecodeConfig(
            self.kv_cache,
            self.layout,
            self.model.group,
            self.calibrated,
            scale,
            self.options.get("most", len(query)),
            self.model.max_leases,
        )
        batch = DecodeBatch(self.block_table, query_rows, lengths, self.leases)
        *results, recent = self.runner.attend(
            config, query, layer, batch, output, lse, **self.options
        )
        for written, result in zip((output, lse, self.kv_cache), results, strict=True):
            if result is not written:
                written.copy_(result)
        assert torch.equal(recent, query)

    def query(self, *shape):
        made = super().query(*shape)
        if self.runner.by_cache:
            made = made.to(self.model.dtype).to(self.model.query_dtype)
        return made

    def tolerance(self):
        errors = self.runner.errors
        own = errors[self.model.query_dtype]
        return max(errors[self.model.dtype], own) if self.runner.by_cache else own

    def outputs(self, rows: list[int], lengths: list[int], layer: int = 0):
        """Outputs and lse of queries of ones."""
        shape = (len(rows), self.model.kv_heads * self.model.group, self.model.head_size)
        output, lse = torch.full(shape, torch.nan), torch.full(shape[:2], torch.nan)
        numbers = (torch.tensor(n, dtype=torch.int32) for n in (rows, lengths))
        self.decode(torch.ones(shape), layer, *numbers, 1.0, output, lse)
        return output, lse


LEASES = 4
"""Of a request at most, where a prompt has no basis of its own."""


def run_ragged(runner: Runner, model: Model, seed: int = 0, **options) -> None:
    """Leases and tails of many lengths, several queries of a row, and ragged batches."""
    if not model.prompt_basis_rank:
        model = replace(model, max_leases=LEASES)
    case = Case(runner, model, leases.ragged(model), seed, **options)
    rows = [*range(len(case.totals)), 0, 1, 1]
    totals = [case.totals[row] for row in rows]
    totals[-3] -= 5  # several queries of a row, of different lengths
    totals[-2] -= 33
    totals[-1] = 1
    case.check(rows, totals)
