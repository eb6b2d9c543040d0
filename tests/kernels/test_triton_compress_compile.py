"""The Triton compression kernels compiled for GPUs that are not there."""

from pathlib import Path

import pytest
import torch

from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import LOSSES

pytest.importorskip("triton")

import triton
from compiler import SHARED_LIMIT, compile_signature

from mdkv_vllm.kernels.triton import (
    allocate_kernels,
    assign_kernel,
    page_kernels,
    paged,
    place,
)
from mdkv_vllm.kernels.triton.compress import (
    LOSS_TOKENS,
    MAX_TILE_QUERIES,
    NUM_WARPS,
    SPLIT_TILE,
    Tiles,
)
from mdkv_vllm.kernels.triton.log_sum_kernels import (
    merge_log_sums,
    query_log_sums,
    split_queries,
)
from mdkv_vllm.kernels.triton.loss_kernel import finish_losses, plain_losses
from mdkv_vllm.kernels.triton.pack import PackShape, pack_list_page
from mdkv_vllm.kernels.triton.prompt_shape import PromptShape
from mdkv_vllm.kernels.triton.shapes import padded
from mdkv_vllm.kernels.triton.token_sum_kernels import token_sums
from mdkv_vllm.kernels.triton.value_error_kernels import value_errors

pytestmark = pytest.mark.slow

CAPABILITIES = tuple(SHARED_LIMIT)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async"}
DEFAULT = ("drop", "i4", "i8", "full")

POINTERS = dict.fromkeys(
    ("rotated", "basis", "key_basis", "value_basis", "log_sums", "sums", "masses", "norms",
     "errors", "losses", "parts", "rest_parts", "per_page", "paid", "over"), "fp32"
)  # fmt: skip
POINTERS |= dict.fromkeys(("costs", "totals", "above", "budgets", "bounds", "objective"), "fp64")
POINTERS |= dict.fromkeys(("blocks", "order", "counts", "wanted", "ranks", "gains", "found"), "i32")
POINTERS |= dict.fromkeys(("table", "capacity", "room", "tokens", "first", "end"), "i64")
POINTERS |= {"halves": "fp16", "pages": "u8", "choice": "i8", "code_scales": "u16"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, constants, capability, num_warps=4, num_stages=3, **pointers):
    """Compile with those pointer types besides the usual; integers are any."""
    types = POINTERS | pointers
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in types:
            return f"*{types[argument]}"
        return "fp32" if argument == "scale" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    made = compile_signature(
        kernel, signature, constants, capability, num_warps, num_stages=num_stages
    )
    assert made.shared <= SHARED_LIMIT[capability]
    return made


# The oldest Triton's compiler leaves some bytes of counters in memory.
SPILLS = 64 if triton.__version__.startswith("3.6.") else 0


def check(kernel, constants, capability, num_warps=4, num_stages=3, stack=0, **pointers):
    """Nothing spills but for so many bytes."""
    made = compiled(kernel, constants, capability, num_warps, num_stages, **pointers)
    assert made.local == 0
    most = max(stack, SPILLS)
    assert made.stack <= most, f"{made.stack} bytes spill: {made.registers} registers"
    return made


def shape_of(names, size, dtype=BF16, loss="hybrid", query_dtype=None, group=4):
    geometry = PageGeometry(16, size, dtype)
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, 32, 8, 0)
    return PromptShape(layout, group, query_dtype or dtype, LOSSES[loss], formats.basis_rank)


def scores(kernel, shape, capability, candidate=-1, test=check, **options):
    geometry = shape.layout.geometry
    only = kernel is query_log_sums and candidate < 0
    constants = Tiles.of(geometry, only).options(64)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants |= {"SHAPE": shape, "CANDIDATE": candidate, "CAUSAL": True}
    options |= {"cache": NAMES[geometry.dtype], "hadamard": NAMES[geometry.dtype]}
    options["queries"] = NAMES[shape.query_dtype]
    return test(kernel, constants, capability, warps, stages, **options)


WINDOW = (
    query_log_sums, token_sums, value_errors
)  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", WINDOW, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize(("size", "dtype"), [(64, BF16), (128, BF16), (128, FP16), (256, BF16)])
def test_window(kernel, size, dtype, capability):
    made = scores(kernel, shape_of(DEFAULT, size, dtype), capability, stack=8)
    # Products of 16 tokens are too small for a warp group.
    if Tiles.of(PageGeometry(16, size, dtype)).tokens >= 64:
        assert MATRIX_INSTRUCTION[capability] in made.ptx
        # Though the addresses of tokens come from a table.
        assert made.load_widths(Path(paged.__file__), "tl.load(cache + offsets") <= {128}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "shape",
    [
        shape_of(("drop", "r16", "r32i8", "full"), 80, FP16, "paper"),
        shape_of(("i2", "i4", "i8"), 96, BF16, "pooled", FP32),
    ],
    ids=lambda shape: str(shape.loss),
)
def test_window_of_other_formats(shape, capability):
    scores(query_log_sums, shape, capability, candidate=1, stack=64)
    scores(token_sums, shape, capability, stack=64)
    scores(value_errors, shape, capability, stack=64)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_window_of_a_float32_cache_compiles(capability):
    """It may spill: a float32 cache is not what servers on GPUs have."""
    shape = shape_of(DEFAULT, 128, FP32, "solo")
    scores(token_sums, shape, capability, test=compiled)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("size", "names"),
    [
        (64, ("r32i8", "i4")),
        (80, ("r16", "i8", "i4")),
        (128, ("r16", "r32i8", "i8", "i4", "i2", "full")),
        (256, ("i8", "i4", "i2", "full")),
    ],
)
def test_pack(size, names, capability):
    shape = shape_of(names, size)
    for index in range(len(names)):
        constants = {"LIST": PackShape.of(shape, index), "FORMAT": index, "FORMATS": len(names)}
        check(
            pack_list_page,
            constants | {"SHAPE": shape},
            capability,
            cache="bf16",
            hadamard="bf16",
        )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_small_kernels(capability):
    shape = shape_of(DEFAULT, 128)
    check(plain_losses, {"SHAPE": shape, "TOKENS": LOSS_TOKENS}, capability)
    check(finish_losses, {"SHAPE": shape, "TOKENS": LOSS_TOKENS}, capability)
    check(merge_log_sums, {"TILE": MAX_TILE_QUERIES}, capability, 2)
    check(split_queries, {"TILE": SPLIT_TILE}, capability)
    check(place.order_tokens, {"FORMATS": 3}, capability, NUM_WARPS)
    check(place.first_pages, {"FORMATS": 3}, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("options", "drop"), [(1, 0), (4, 1), (4, 0), (9, 1)])
def test_allocation(options, drop, capability):
    constants = {"OPTIONS": options, "DROP": drop, "SHARE": allocate_kernels.SHARE}
    constants |= {"PADDED": padded(options), "ROWS": 8, "NUMBERS": 256}
    constants |= {"ROUNDS": allocate_kernels.ROUNDS}
    warps = allocate_kernels.NUM_WARPS
    # Every option's part of the code is its own: nine of them are many.
    many = 128 * (options > 4)
    check(allocate_kernels.ask_prices, constants, capability, warps, stack=many)
    check(allocate_kernels.count_options, constants, capability, warps, prices="fp64")
    check(page_kernels.last_bracket, constants, capability, 1, prices="fp64")
    check(page_kernels.settle, constants, capability, 1, prices="fp64", pages="fp64")
    check(assign_kernel.assign, constants, capability, warps, stack=many, prices="fp32")
    if options > 1:
        # Four scalars, outside of the loops over tokens, where a multiprocessor has few registers.
        some = max(many, 16 * (capability < 90))
        check(page_kernels.page_costs, constants, capability, warps, stack=some, out="fp64")
        check(page_kernels.give_pages, constants, capability, 4, pages="fp64")
