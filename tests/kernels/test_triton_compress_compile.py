"""The Triton compression kernels compiled for GPUs that are not there."""

from pathlib import Path

import pytest
import torch

from mdkv_vllm.core.formats import PageGeometry, parse_format

pytest.importorskip("triton")

from compiler import SHARED_LIMIT, compile_signature

from mdkv_vllm.triton_kernels import allocate_kernels, project, window_kernels, window_scores
from mdkv_vllm.triton_kernels.elements import element_type
from mdkv_vllm.triton_kernels.pack import PackShape, pack_list_page
from mdkv_vllm.triton_kernels.quantise import gaussian_step, read_back, tile_vectors
from mdkv_vllm.triton_kernels.shapes import padded
from mdkv_vllm.triton_kernels.window_kernels import row_log_sums, token_sums
from mdkv_vllm.triton_kernels.window_scores import chunk_of

CAPABILITIES = tuple(SHARED_LIMIT)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(kernel, pointers, constants, capability, num_warps=4):
    """Compile with those pointer types; strides are multiples of 16, other integers are any."""

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in pointers:
            return f"*{pointers[argument]}"
        return "fp32" if argument == "scale" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    strides = tuple(argument for argument in kernel.arg_names if argument.endswith("stride"))
    compiled = compile_signature(kernel, signature, constants, capability, num_warps, strides)
    assert compiled.local == compiled.stack == 0, f"spills: {compiled.registers} registers"
    assert compiled.shared <= SHARED_LIMIT[capability]
    return compiled


def check_scores(kernel, pointers, constants, capability):
    constants = constants | {"ROWS": window_scores.MAX_TILE_ROWS}
    constants |= {"TOKENS": window_scores.TILE_TOKENS}
    compiled = check(kernel, pointers, constants, capability, window_scores.NUM_WARPS)
    assert MATRIX_INSTRUCTION[capability] in compiled.ptx
    # Tiles come by asynchronous copies of 16 bytes (cg has no other size), or as many at once.
    assert "cp.async.cg.shared.global" in compiled.ptx
    assert "cp.async.ca.shared.global" not in compiled.ptx
    assert compiled.load_widths(Path(window_kernels.__file__), "return tl.load(rows") <= {128}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(64, FP32), (80, BF16), (96, FP32), (128, BF16), (128, FP16), (128, FP32), (256, FP32)],
)
def test_row_log_sums(rank, dtype, capability):
    constants = {"GROUP": 4, "DIMS": rank, "CHUNK": chunk_of(rank, dtype)}
    constants |= {"TYPE": element_type(dtype), "SHARE": window_scores.TOKENS_PER_PROGRAM}
    pointers = dict.fromkeys(("queries", "keys"), POINTERS[dtype]) | {"log_sums": "fp32"}
    check_scores(row_log_sums, pointers, constants, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("rank", "other_rank", "dtype", "other_dtype", "together"),
    [
        (64, 64, FP32, FP32, False),
        (80, 80, BF16, FP32, False),
        (96, 96, FP16, FP16, False),
        (128, 16, FP32, FP32, False),
        (128, 128, BF16, BF16, True),
        (128, 128, BF16, FP32, False),
        (128, 0, BF16, BF16, False),
        (256, 256, FP32, FP32, False),
        (256, 256, FP32, FP32, True),
    ],
)
def test_token_sums(rank, other_rank, dtype, other_dtype, together, capability):
    constants = {"DIMS": rank, "CHUNK": chunk_of(rank, dtype), "TYPE": element_type(dtype)}
    constants |= {"OTHER_DIMS": other_rank, "OTHER_CHUNK": chunk_of(other_rank, other_dtype)}
    constants |= {"OTHER_TYPE": element_type(other_dtype), "TOGETHER": together}
    pointers = dict.fromkeys(("log_sums", "other_log_sums", "mass", "moved"), "fp32")
    pointers |= dict.fromkeys(("queries", "keys"), POINTERS[dtype])
    pointers |= dict.fromkeys(("other_queries", "other_keys"), POINTERS[other_dtype])
    check_scores(token_sums, pointers, constants, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rank", [80, 128, 256])
def test_read_back(rank, bits, capability):
    constants = {"RANK": rank, "PADDED": padded(rank), "BITS": bits}
    constants |= {"STEP": gaussian_step(bits), "TOKENS": tile_vectors(padded(rank))}
    pointers = dict.fromkeys(("read", "error", "keys", "values"), "fp32")
    check(read_back, pointers, constants, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("head_size", "names"),
    [
        (64, ("r32i8", "i4")),
        (80, ("r16", "i8", "i4")),
        (128, ("r16", "r32i8", "i8", "i4", "i2", "full")),
        (256, ("i8", "i4", "i2", "full")),
    ],
)
def test_pack(head_size, names, capability):
    geometry = PageGeometry(16, head_size, BF16)
    for name in names:
        fmt = parse_format(name, geometry)
        shape = PackShape(fmt, element_type(geometry.dtype), geometry.page_bytes)
        constants = {"LIST": shape, "FORMAT": 1, "FORMATS": 3}
        pointers = {"order": "i64", "lists": "i64", "pages": "u8", "keys": "fp32", "values": "fp32"}
        check(pack_list_page, pointers, constants, capability)


ALLOCATION = dict.fromkeys(("losses", "gains", "pages"), "fp32")
ALLOCATION |= dict.fromkeys(("costs", "totals", "sums"), "fp64")
ALLOCATION |= {"counts": "i32", "held": "i8", "ranks": "i64", "room": "i64", "prices": "fp32"}
OVER = (allocate_kernels.ALL, allocate_kernels.CHEAPER, allocate_kernels.HELD)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("options", [1, 4, 9])
def test_allocation(options, capability):
    constants = {"OPTIONS": options, "LIST": min(2, options - 1), "DROP": True}
    calls = [
        (allocate_kernels.ask_pages, {}),
        (allocate_kernels.count_options, {"PADDED": padded(options)}),
        *((allocate_kernels.list_gains, {"OVER": over}) for over in OVER),
        (allocate_kernels.top_sums, {}),
        (allocate_kernels.clear_list, {}),
        (allocate_kernels.fill_list, {}),
    ]
    for kernel, more in calls:
        used = {name: value for name, value in constants.items() if name in kernel.arg_names}
        pointers = ALLOCATION
        if kernel is allocate_kernels.count_options:
            pointers = ALLOCATION | {"prices": "fp64"}
        warps = 4 if kernel is allocate_kernels.list_gains else allocate_kernels.NUM_WARPS
        check(kernel, pointers, used | more, capability, warps)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("size", "rank", "dtype"),
    [(64, 64, BF16), (80, 80, FP32), (96, 12, FP16), (128, 128, BF16), (256, 256, FP32)],
)
def test_project(size, rank, dtype, capability):
    columns = padded(rank)
    constants = {"DIMS": size, "RANK": rank, "CHUNK": project.CHUNK}
    constants |= {"COLUMNS": columns, "ROWS": project.tile_rows(columns)}
    pointers = {"vectors": POINTERS[dtype], "encoder": "fp32", "projected": "fp32"}
    compiled = check(project.project_rows, pointers, constants, capability, project.NUM_WARPS)
    assert MATRIX_INSTRUCTION[capability] in compiled.ptx
