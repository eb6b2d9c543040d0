"""What the CUDA kernels' interface refuses, and how they are planned; run on the CPU."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cuda_host import process as host

from mdkv_vllm.core.formats import FormatSet, Kind, PageFormat, Rotation
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.kernels.cuda.decode import CudaDecode
from mdkv_vllm.kernels.cuda.library import CudaKernelError, library
from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES, DecodeBatch, DecodeConfig
from mdkv_vllm.testing.leases import Case, Model, Request

SHARED_LIMIT = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB of shared memory that a block may have."""


@pytest.fixture(scope="module")
def process(cuda_host_library):
    with host.start(cuda_host_library) as running:
        yield running


@dataclass
class Arguments:
    """Of a call on a small case; a test changes one."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    layer: int
    block_table: torch.Tensor
    query_rows: torch.Tensor
    lengths: torch.Tensor
    leases: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor | None = None
    recent: torch.Tensor | None = None


def arguments(block_size=16):
    model = Model(query_dtype=torch.bfloat16, block_size=block_size)
    case = Case(model, [Request(6, 5), Request(0, 9)])
    query = case.query(2, 6, 64)
    return case, Arguments(
        query,
        case.kv_cache,
        0,
        case.block_table,
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor(case.totals, dtype=torch.int32),
        case.leases,
        torch.empty_like(query),
    )


def config(layout, group, kv_cache=None, max_queries=1):
    """Of a model without a calibrated basis."""
    if kv_cache is None:
        kv_cache = torch.empty(0)
    return DecodeConfig(kv_cache, layout, group, None, 1.0, max_queries)


def call(layout, group, a):
    """In the process; what was refused."""
    try:
        kernel = CudaDecode(config(layout, group, a.kv_cache, 2), 4)
        batch = DecodeBatch(a.block_table, a.query_rows, a.lengths, a.leases)
        kernel.attend(a.query, a.layer, batch, a.output, a.lse, a.recent)
    except (CudaKernelError, ValueError) as error:
        return str(error)
    return ""


def test_head_sizes_are_those_of_the_source():
    source = (Path(__file__).parents[2] / "csrc" / "cuda" / "tables.cuh").read_text()
    (sizes,) = re.findall(r"kHeadSizes\[\] = \{(.*)\};", source)
    assert tuple(map(int, sizes.split(","))) == GPU_HEAD_SIZES


def test_takes_what_is_right(process):
    case, right = arguments()
    assert process.submit(call, case.layout, case.model.group, right).result() == ""


@pytest.mark.parametrize(
    ("field", "change", "told"),
    [
        ("query", lambda x: x[:, 1:], "query: shape [2, 5, 64]"),
        ("query", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "last dimension"),
        ("query", lambda x: x.double(), "query, output: torch.float64"),
        ("output", lambda x: x.half(), "expected both"),
        ("kv_cache", lambda x: x.half(), "kv_cache: torch.float16"),
        ("kv_cache", lambda x: x[:, :, :8], "kv_cache: torch.bfloat16"),
        ("kv_cache", lambda x: x[::2], "must be contiguous"),
        ("layer", lambda x: 2, "layer: 2; the cache has 2 layers"),
        ("block_table", lambda x: x.long(), "block_table: torch.int64"),
        ("leases", lambda x: x.squeeze(1), "leases: [2, 2]; expected [rows, 1, 2]"),
        ("leases", lambda x: x.repeat(1, 2, 1), "leases: [2, 2, 2]; expected [rows, 1, 2]"),
        ("leases", lambda x: x.long(), "leases: torch.int64 [2, 1, 2]"),
        ("lengths", lambda x: x[:1], "one for every query"),
        ("lse", lambda x: torch.empty(2, 5), "lse: torch.float32 [2, 5]"),
        ("recent", lambda x: torch.empty(2, 6, 32), "recent: torch.float32 [2, 6, 32]"),
    ],
)
def test_refuses_arguments(process, field, change, told):
    case, right = arguments()
    wrong = replace(right, **{field: change(getattr(right, field))})
    refused = process.submit(call, case.layout, case.model.group, wrong).result()
    assert told in refused


def plan(layout, group, kib):
    """In the process; warps, stages and bytes, or what was refused."""
    library().mdkv_host_device(kib << 10)
    try:
        found = CudaDecode(config(layout, group)).plan
    except (CudaKernelError, ValueError) as error:
        return str(error)
    return found.warps, found.stages, found.shared_bytes


@pytest.mark.parametrize("device", SHARED_LIMIT)
@pytest.mark.parametrize("head_size", GPU_HEAD_SIZES)
def test_stages_fit(process, device, head_size):
    limit = SHARED_LIMIT[device]
    layout = Model(("i4", "i8", "full"), head_size).layout()
    warps, stages, size = process.submit(plan, layout, 4, limit).result()
    assert warps > 0
    assert 2 <= stages <= 4
    assert stages * layout.geometry.page_bytes < size <= limit << 10


def decode_after_another_plan(layout, small, a):
    """In the process: a plan of large pages, one of small pages, then a call by the first."""
    library().mdkv_host_device(227 << 10)
    kernel = CudaDecode(config(layout, 3, a.kv_cache, 2))
    other = CudaDecode(config(small, 3))
    batch = DecodeBatch(a.block_table, a.query_rows, a.lengths, a.leases)
    refused = ""
    try:
        kernel.attend(a.query, 0, batch, a.output)
    except CudaKernelError as error:
        refused = str(error)
    return refused, kernel.plan.shared_bytes, other.plan.shared_bytes


def test_a_plan_leaves_another_shape_its_shared_memory(process):
    """What launches may have is the kernel's, and shapes of one head size share the kernel."""
    case, right = arguments(block_size=128)
    small = Model(("i4",), block_size=8).layout()
    job = process.submit(decode_after_another_plan, case.layout, small, right)
    refused, needed, other = job.result()
    assert refused == ""
    assert other < needed
    assert needed > 48 << 10


def with_format(layout, **changes):
    """A layout whose only format is changed to one that no name gives."""
    fmt = PageFormat("odd", Kind.CODES, 64, 8, Rotation.HADAMARD, 31)
    return replace(layout, formats=FormatSet((replace(fmt, **changes),), False))


def refusals():
    layout = Model().layout()
    basis = replace(layout, formats=Model(("r16",)).layout().formats)

    def other(model: Model) -> LeaseLayout:
        return model.layout()

    return [
        (other(Model(dtype=torch.float32)), "must be float16 or bfloat16"),
        (other(Model(head_size=72)), "head size 72 is not built; built are 64 80 96 128 256"),
        (other(Model(head_size=128, block_size=256)), "do not fit 101376 bytes of shared memory"),
        (with_format(layout, kind=Kind.ELEMENTS), "format 0: 8 bits"),
        (with_format(layout, rank=62), "format 0: rank 62"),
        (with_format(layout, rank=32), "format 0: rotation 2"),
        (with_format(layout, tokens_per_page=40), "format 0: 40 tokens in a page"),
        (basis, "the basis has 0 directions; formats read 16"),
    ]


@pytest.mark.parametrize(("layout", "told"), refusals(), ids=[told for _, told in refusals()])
def test_refuses_shapes(process, layout, told):
    assert told in process.submit(plan, layout, 4, 99).result()


def test_too_many_formats(process):
    names = (*(f"r{4 * i}" for i in range(1, 16)), "i8", "i4")
    layout = Model(names).layout()
    assert (
        "17 page formats; the CUDA kernel takes 16"
        in process.submit(plan, replace(layout, prompt_basis_rank=60), 4, 99).result()
    )
