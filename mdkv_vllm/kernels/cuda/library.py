"""The library of CUDA kernels (csrc/cuda) and its C interface.

Importing this module needs neither CUDA nor the library; :func:`library` does. The library is what
``scripts/build-cuda.sh`` puts into the package, or what ``MDKV_CUDA_LIBRARY`` names.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from mdkv_vllm.core.formats import DESCRIPTOR, full_format
from mdkv_vllm.core.layout import LeaseLayout

LIBRARY = Path(__file__).resolve().parents[2] / "libmdkv_cuda.so"
ABI = 4
MAX_FORMATS = 16

ELEMENT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Element types by their number in the interface."""


class CudaKernelError(RuntimeError):
    """The CUDA kernel is not there, or refuses what it was asked for."""


class _Format(ctypes.Structure):
    """``mdkv_page_format`` of csrc/common/page_format.h."""

    _fields_ = [(name, ctypes.c_int32) for name in DESCRIPTOR]


class Shape(ctypes.Structure):
    """``mdkv_shape`` of csrc/cuda/mdkv_cuda.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "element",
                "head_size",
                "block_size",
                "num_layers",
                "num_kv_heads",
                "group",
                "num_formats",
                "basis_rank",
                "prompt_basis",
                "basis_first_page",
                "basis_pages",
                "max_leases",
            )
        ),
        ("formats", _Format * (MAX_FORMATS + 1)),
    ]


class Plan(ctypes.Structure):
    """``mdkv_plan``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("warps", "stages", "shared_bytes")]


class Call(ctypes.Structure):
    """``mdkv_call``."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("query_element", ctypes.c_int32),
        ("queries", ctypes.c_int32),
        ("kv_cache", ctypes.c_void_p),
        ("layer", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("query_rows", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("leases", ctypes.c_void_p),
        ("basis_keys", ctypes.c_void_p),
        ("basis_values", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
        ("output_head_stride", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("recent", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    ]


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        CudaKernelError: it is not built, cannot be loaded, or is of another version.
    """
    path = Path(os.environ.get("MDKV_CUDA_LIBRARY", LIBRARY))
    if not path.exists():
        raise CudaKernelError(
            f"the CUDA kernels are not built: {path} does not exist. Build them with "
            "`scripts/build-cuda.sh`, which needs nvcc"
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise CudaKernelError(f"the CUDA kernels cannot be loaded: {error}") from error
    if loaded.mdkv_cuda_abi() != ABI:
        raise CudaKernelError(
            f"{path} has interface {loaded.mdkv_cuda_abi()}, this package needs {ABI}; "
            "build it again with `scripts/build-cuda.sh`"
        )
    loaded.mdkv_cuda_error.restype = ctypes.c_char_p
    return loaded


def why_not() -> str:
    """Why the kernel cannot be used here; empty where it can."""
    try:
        library()
    except CudaKernelError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"


def available() -> bool:
    """Whether the library is there, and a GPU."""
    return not why_not()


def check(status: int) -> None:
    """Look at what a function of the library returned.

    Raises:
        CudaKernelError: it refused or failed, with the reason.
    """
    if status != 0:
        raise CudaKernelError(f"CUDA decode kernel: {library().mdkv_cuda_error().decode()}")


def shape_of(layout: LeaseLayout, group: int, basis_rank: int, max_leases: int) -> Shape:
    """A model's layout, as C takes it.

    Args:
        layout: what leases look like.
        group: query heads per KV head.
        basis_rank: directions of the basis, the prompt's own or calibrated; 0 for none.
        max_leases: leases of a request at most.

    Raises:
        CudaKernelError: there are more formats than the kernel takes.
    """
    return Shape(
        ELEMENT[layout.geometry.dtype],
        layout.geometry.head_size,
        layout.geometry.block_size,
        layout.num_layers,
        layout.num_kv_heads,
        group,
        len(layout.formats.formats),
        basis_rank,
        int(layout.prompt_basis_rank > 0),
        layout.basis_first_page,
        layout.basis_pages_per_head,
        max_leases,
        _formats(layout),
    )


def _formats(layout: LeaseLayout) -> ctypes.Array[_Format]:
    """The formats of leases, and behind them the tail's."""
    formats = layout.formats.formats
    if len(formats) > MAX_FORMATS:
        raise CudaKernelError(
            f"formats: {len(formats)} page formats; the CUDA kernel takes {MAX_FORMATS}"
        )
    rows = [_Format(*f.descriptor()) for f in (*formats, full_format(layout.geometry))]
    return (_Format * (MAX_FORMATS + 1))(*rows)
