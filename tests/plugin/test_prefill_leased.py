"""Chunks behind leases against attention computed in float64.

vLLM's CPU kernel and torch's run as they are; of FlashAttention and xformers, plain torch carries
out the calls that we make to them, as in ``test_prefill_attention.py``.
"""

import ast
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from mdkv_vllm.core import reference
from mdkv_vllm.kernels.interface import Chunk, ReadConfig
from mdkv_vllm.kernels.registry import lease_reader
from mdkv_vllm.plugin.prefill import head_calls, leased
from mdkv_vllm.plugin.prefill.cpu import CpuHeads, CpuPrefill
from mdkv_vllm.plugin.prefill.head_calls import plan_calls, scratch_bytes
from mdkv_vllm.plugin.prefill.leased import LeasedPrefill
from mdkv_vllm.plugin.prefill.sdpa import SdpaHeads, SdpaPrefill
from mdkv_vllm.testing.leases import EVERY_FORMAT, Case, Model

current_platform.import_kernels()

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {FP32: 1e-4, FP16: 3e-3, BF16: 2e-2}
SCALE = 0.125


def attend(query, keys, values, scale):
    """Float64 ``[tokens, group, d]``: the last query sees all of ``[keys, d]``."""
    scores = torch.einsum("qgd,kd->gqk", query.double(), keys.double()) * scale
    hidden = torch.ones(len(query), len(keys), dtype=torch.bool).triu(len(keys) - len(query) + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("gqk,kd->qgd", weights, values.double())


def flash_attn_varlen_func(
    *, q, k, v, out, cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, softmax_scale, causal,
    fa_version,
):  # fmt: skip
    """FlashAttention of sequences side by side: K and V ``[keys, 1, head_size]``."""
    assert causal
    assert fa_version == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    assert k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k >= int(cu_seqlens_k.diff().max())
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        seen = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        out[rows] = attend(q[rows], k[seen, 0], v[seen, 0], softmax_scale).to(out.dtype)


def memory_efficient_attention_forward(query, key, value, attn_bias, scale):
    """xformers' attention of padded sequences, whose lengths it reads on the device."""
    assert key.stride(3) == 0 or key.shape[3] == 1, "the group's copies must cost nothing"
    found = torch.empty_like(query)
    lengths = attn_bias.k_seqinfo.seqlen
    assert lengths.dtype == torch.int32
    assert attn_bias.k_seqinfo.seqstart_py[-1] == key.shape[1]
    for i, (begin, end) in enumerate(attn_bias.q_seqinfo.intervals()):
        first = int(attn_bias.k_seqinfo.seqstart[i])
        seen = slice(first, first + int(lengths[i]))
        result = attend(query[0, begin:end, 0], key[0, seen, 0, 0], value[0, seen, 0, 0], scale)
        found[0, begin:end, 0] = result.to(found.dtype)
    return found


@pytest.fixture
def flash(monkeypatch):
    module = ModuleType("vllm.vllm_flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    from mdkv_vllm.plugin.prefill import flash as ours

    monkeypatch.setattr(ours, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(ours, "flash_attn_varlen_func", flash_attn_varlen_func)
    return SdpaPrefill(), ours.FlashHeads(64)


@pytest.fixture
def xformers(monkeypatch):
    from mdkv_vllm.plugin.prefill import xformers as ours

    monkeypatch.setattr(
        ours, "memory_efficient_attention_forward", memory_efficient_attention_forward
    )
    return SdpaPrefill(), ours.XformersHeads()


@pytest.fixture
def tiled(monkeypatch):
    """torch's attention a few rows at a time."""
    from mdkv_vllm.plugin.prefill import sdpa as ours

    monkeypatch.setattr(ours, "SCORE_ELEMENTS", 3 * 900 * 7)
    return SdpaPrefill(), SdpaHeads()


@pytest.fixture
def implementation(request):
    if isinstance(request.param, str):
        return request.getfixturevalue(request.param)
    return tuple(make() for make in request.param)


@dataclass
class Asked:
    """A chunk: its leases' blocks and how full they are, full tokens before it, and its own."""

    leases: list[tuple[int, float]]
    tail: int
    tokens: int


class Step:
    """A cache with leases and tails, and the chunks of a step."""

    def __init__(self, model: Model, asked: list[Asked], seed: int = 0) -> None:
        self.case = case = Case(model, [], seed)
        self.model, self.layout = model, case.layout
        shape = (2000, self.layout.pages_per_block, model.block_size, 2 * model.head_size)
        case.kv_cache = case.randn(*shape).to(model.dtype)
        self.free = torch.randperm(shape[0], generator=case.gen).tolist()
        self.block_table = torch.full((len(asked), 700), -1, dtype=torch.int32)
        self.chunks: list[Chunk] = []
        at = 1
        for row, one in enumerate(asked):
            leases, end = [], 0
            for blocks, fill in one.leases:
                first = end + self.freed_before(blocks, fill, row, end)
                end = first + blocks
                leases.append((first, end))
            context = end * model.block_size + one.tail
            for index in range(end, -(-(context + one.tokens) // model.block_size)):
                self.block_table[row, index] = self.free.pop()
            self.chunks.append(Chunk(at, at + one.tokens, context, row, tuple(leases)))
            at += one.tokens + row % 2  # a token of another request between some
        self.tokens = at
        self.query = case.query(at, model.kv_heads * model.group, model.head_size)

    def freed_before(self, blocks: int, fill: float, row: int, at: int) -> int:
        """Write a lease behind as many freed blocks as make no head keep more than its span."""
        taken = [self.free.pop() for _ in range(blocks)]
        self.case.fill_lease(taken, fill)
        pages = reference.lease_pages(self.case.kv_cache, torch.tensor(taken))
        kept = reference.read_page_table(pages, self.layout)[..., 0].sum(-1).max()
        freed = max(-(-int(kept) // self.model.block_size) - blocks, 0)
        self.block_table[row, at + freed : at + freed + blocks] = torch.tensor(taken)
        return freed

    @property
    def config(self) -> ReadConfig:
        return ReadConfig(self.case.kv_cache, self.layout, self.case.calibrated)

    @cache
    def seen(self, chunk: Chunk, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 keys and values of a chunk, its own the last."""
        size, row = self.model.block_size, self.block_table[chunk.row]
        sides = [
            reference.read_lease(
                self.case.kv_cache, row[first:end], layer, head, self.layout, self.case.calibrated
            )
            for first, end in chunk.leases
        ]
        behind = chunk.leases[-1][1] if chunk.leases else 0
        at = torch.arange(behind * size, chunk.total)
        place = layer * self.model.kv_heads + head
        slots = self.case.kv_cache[row.long()[at // size], place, at % size].double()
        sides.append(slots.split(self.model.head_size, -1))
        return tuple(torch.cat(side) for side in zip(*sides, strict=True))

    def run(self, implementation, layer: int = 1) -> torch.Tensor:
        """Output of a step, 7 where nothing was written."""
        model, config = self.model, self.config
        plain, heads = implementation
        prefill = LeasedPrefill(plain, heads, lease_reader(config), config, model.query_dtype)
        output = torch.full_like(self.query, 7.0)
        own = torch.full((2, self.tokens, model.kv_heads, model.head_size), torch.nan)
        for chunk in self.chunks:
            for head in range(model.kv_heads):
                for side, rows in zip(own, self.seen(chunk, layer, head), strict=True):
                    side[chunk.start : chunk.stop, head] = rows[-chunk.tokens :].float()
        view = config.kv_cache[:, layer * model.kv_heads : (layer + 1) * model.kv_heads]
        key, value = own.to(model.query_dtype)
        step = prefill.prepare(self.chunks, self.block_table)
        step.attend(self.query, key, value, view, layer, SCALE, output)
        return output

    @cache
    def exact(self, chunk: Chunk, layer: int, head: int) -> torch.Tensor:
        """Float64 output of a KV head's group."""
        group = self.model.group
        query = self.query[chunk.start : chunk.stop, head * group : (head + 1) * group]
        return attend(query, *self.seen(chunk, layer, head), SCALE)

    def check(self, implementation, layer: int = 1) -> None:
        output = self.run(implementation, layer)
        others = torch.ones(self.tokens, dtype=torch.bool)
        tolerance, group = TOLERANCE[self.model.query_dtype], self.model.group
        for chunk in self.chunks:
            rows = slice(chunk.start, chunk.stop)
            others[rows] = False
            for head in range(self.model.kv_heads):
                mine = slice(head * group, (head + 1) * group)
                exact = self.exact(chunk, layer, head)
                error = (output[rows, mine].double() - exact).norm(dim=-1)
                assert (error <= tolerance * exact.norm(dim=-1) + 1e-6).all(), (chunk, head)
        assert (output[others] == 7.0).all(), "tokens of other requests were written"


@cache
def step_of(asked: int | None = None, **model) -> Step:
    """A step of the first of the ragged chunks; tests leave it as it is."""
    return Step(Model(**model), RAGGED[:asked])


RAGGED = [
    Asked([(24, 0.9), (9, 0.5), (7, 0.9)], 21, 40),
    Asked([], 17, 30),
    Asked([(6, 0.9)], 0, 1),
    Asked([(5, 0.0)], 0, 50),
    Asked([(8, 0.0), (11, 0.9)], 32, 131),
]
CPU, SDPA = (CpuPrefill, partial(CpuHeads, FP32, 64)), (SdpaPrefill, SdpaHeads)
ALL = pytest.mark.parametrize(
    "implementation", [CPU, SDPA, "tiled", "flash", "xformers"], indirect=True
)


@ALL
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("rank", [0, 32])
def test_every_format(implementation, dtype, rank):
    step = step_of(names=EVERY_FORMAT, dtype=dtype, query_dtype=dtype, prompt_basis_rank=rank)
    step.check(implementation)


@ALL
@pytest.mark.parametrize("scratch_rows", [1, 700, 1500, 4000])
def test_bounded_scratch(implementation, monkeypatch, scratch_rows):
    """Whatever goes together: one sequence, some heads, chunks of several requests."""
    step = step_of(kv_heads=3, group=2)
    model = step.model
    monkeypatch.setattr(head_calls, "SCRATCH_BYTES", 2 * model.head_size * 4 * scratch_rows)
    taken = []
    monkeypatch.setattr(
        head_calls.HeadCall,
        "read",
        lambda call, *rest, read=head_calls.HeadCall.read: taken.append(call) or read(call, *rest),
    )
    step.check(implementation, layer=0)
    assert sum(len(call.counts) for call in taken) == 4 * model.kv_heads
    for call in taken:
        assert call.rows <= scratch_rows or len(call.counts) == 1
    longest = max(chunk.total for chunk in step.chunks)
    most = scratch_bytes(step.layout, FP32, model.group, longest, step.tokens)
    queries = 4 * step.tokens * model.kv_heads * model.group * 2 * model.head_size
    assert max(2 * model.head_size * 4 * call.rows for call in taken) <= most - queries
    assert len(taken) > 1 or scratch_rows == 4000


@pytest.mark.parametrize("implementation", [CPU, SDPA], indirect=True)
@pytest.mark.parametrize("query_dtype", [FP32, FP16])
def test_a_cache_of_another_type(implementation, query_dtype):
    step_of(names=EVERY_FORMAT, query_dtype=query_dtype).check(implementation)


@pytest.mark.parametrize("implementation", [CPU, SDPA, "flash", "xformers"], indirect=True)
@pytest.mark.parametrize(("head_size", "group", "block_size"), [(80, 1, 16), (128, 7, 32)])
def test_shapes(implementation, head_size, group, block_size):
    step = step_of(
        asked=3, head_size=head_size, group=group, block_size=block_size, query_dtype=BF16
    )
    step.check(implementation)


@pytest.mark.parametrize("implementation", [CPU], indirect=True)
def test_without_leases_nothing_is_planned(implementation, monkeypatch):
    monkeypatch.setattr(leased, "plan_calls", None)
    Step(Model(), [Asked([], 17, 30), Asked([], 0, 5)]).check(implementation)


def test_planning_reads_no_number_on_the_device(flash):
    """On torch's meta device there are none to read."""
    step = step_of()
    table = step.block_table.to("meta")
    config = ReadConfig(step.case.kv_cache.to("meta"), step.layout, None)
    chunks = [chunk for chunk in step.chunks if chunk.leases]
    for heads in (flash[1], SdpaHeads()):
        (call,) = plan_calls(chunks, table, config, BF16, heads)
        assert call.lengths.shape == (2, 8)
        assert call.targets.shape == (2, len(call.sources.fields))
        assert call.targets.is_contiguous()
        heads.prepare(call)


def test_flash_attention_takes_what_we_pass():
    """The stand-in above has the names of the real function, which cannot be imported here."""
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    source = (folder / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    real = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    names = {argument.arg for argument in real.args.args}
    assert set(inspect.signature(flash_attn_varlen_func).parameters) <= names
