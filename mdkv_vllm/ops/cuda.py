"""The CUDA decode kernel (csrc/cuda), called through its C interface.

Importing this module needs neither CUDA nor the library; calling the kernel does. The library is
what ``scripts/build-cuda.sh`` puts beside the package, or what ``MDKV_CUDA_LIBRARY`` names.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.layout import LeaseLayout

LIBRARY = Path(__file__).resolve().parents[1] / "libmdkv_cuda.so"
ABI = 2
MAX_FORMATS = 16

_ELEMENT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NEEDS_BYTES = 16
"""Alignment of the arena and the workspace."""


class CudaKernelError(RuntimeError):
    """The CUDA kernel is not there, or refuses what it was asked for."""


class _Format(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("rank", "bits", "rotation", "tokens_per_page")]


class _Shape(ctypes.Structure):
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
            )
        ),
        ("formats", _Format * MAX_FORMATS),
    ]


class _Plan(ctypes.Structure):
    """``mdkv_plan``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("warps", "stages", "shared_bytes")]


class _Call(ctypes.Structure):
    """``mdkv_call``."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("query_element", ctypes.c_int32),
        ("queries", ctypes.c_int32),
        ("arena", ctypes.c_void_p),
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


def _check(status: int) -> None:
    if status != 0:
        raise CudaKernelError(f"CUDA decode kernel: {library().mdkv_cuda_error().decode()}")


def _formats(formats: FormatSet) -> tuple[int, ctypes.Array[_Format]]:
    if len(formats.formats) > MAX_FORMATS:
        raise CudaKernelError(
            f"formats: {len(formats.formats)} page formats; the CUDA kernel takes {MAX_FORMATS}"
        )
    rows = [_Format(f.rank, f.bits, int(f.rotation), f.tokens_per_page) for f in formats.formats]
    return len(rows), (_Format * MAX_FORMATS)(*rows)


@dataclass(frozen=True)
class DecodeShape:
    """A model's layout, as the kernel is told it.

    Attributes:
        layout: what leases look like.
        group: query heads per KV head.
        basis_rank: directions of the basis, the prompt's own or calibrated; 0 for none.
    """

    layout: LeaseLayout
    group: int
    basis_rank: int

    @property
    def geometry(self) -> PageGeometry:
        """Sizes of pages."""
        return self.layout.geometry

    def as_struct(self) -> _Shape:
        """As C takes it."""
        layout = self.layout
        return _Shape(
            _ELEMENT[self.geometry.dtype],
            self.geometry.head_size,
            self.geometry.block_size,
            layout.num_layers,
            layout.num_kv_heads,
            self.group,
            len(layout.formats.formats),
            self.basis_rank,
            int(layout.prompt_basis_rank > 0),
            layout.basis_first_page,
            layout.basis_pages_per_head,
            _formats(layout.formats)[1],
        )


@dataclass(frozen=True)
class DecodeTables:
    """What :func:`mixed_decode` needs to know of a model; build it once.

    Attributes:
        shape: the model's layout.
        struct: the same for C.
        basis_keys: per layer, float32 ``[kv_heads, rank, head_size]`` on the device; rank 0
            without a calibrated basis.
        basis_values: same.
    """

    shape: DecodeShape
    struct: _Shape
    basis_keys: tuple[torch.Tensor, ...]
    basis_values: tuple[torch.Tensor, ...]

    @classmethod
    def build(
        cls, layout: LeaseLayout, group: int, basis: Basis | None, device: torch.device
    ) -> DecodeTables:
        """Tables of a lease layout and, where formats use one, a calibrated basis.

        Args:
            layout: what leases look like.
            group: query heads per KV head.
            basis: the calibrated basis; None where none is used, or each prompt has its own.
            device: where the arena is.

        Raises:
            CudaKernelError: the basis has fewer directions than a format reads.
        """
        if layout.prompt_basis_rank or basis is None:
            basis = Basis.empty(layout.num_layers, layout.num_kv_heads, layout.geometry.head_size)
        rank = layout.prompt_basis_rank or basis.rank
        if rank < layout.formats.basis_rank:
            raise CudaKernelError(
                f"the basis has {rank} directions; formats read {layout.formats.basis_rank}"
            )
        shape = DecodeShape(layout, group, rank if layout.formats.uses_basis else 0)
        return cls(shape, shape.as_struct(), *basis.rows(device))


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory between the kernels, for batches up to a size. Its contents need no clearing.

    One workspace serves all layers of a model, one call at a time.

    Attributes:
        memory: uint8 on the device.
        plan: how the kernel runs on the device.
        max_queries: queries of the largest batch.
    """

    memory: torch.Tensor
    plan: _Plan
    max_queries: int

    @classmethod
    def allocate(
        cls,
        shape: DecodeShape,
        max_queries: int,
        device: torch.device,
        programs: int | None = None,
    ) -> DecodeWorkspace:
        """Allocate for batches of up to ``max_queries`` queries.

        Args:
            shape: the model's layout.
            max_queries: queries of the largest batch, padding included.
            device: where the arena is.
            programs: warps that share a batch; None for all that the device has room for at once.

        Raises:
            CudaKernelError: the shape is not built, or the library is not there.
        """
        struct, plan, size = shape.as_struct(), _Plan(), ctypes.c_size_t()
        with _on(device):
            _check(library().mdkv_cuda_make_plan(ctypes.byref(struct), ctypes.byref(plan)))
        if programs is not None:
            plan.warps = programs
        _check(
            library().mdkv_cuda_workspace_bytes(
                ctypes.byref(struct), ctypes.byref(plan), max_queries, ctypes.byref(size)
            )
        )
        memory = torch.empty(size.value, dtype=torch.uint8, device=device)
        return cls(memory, plan, max_queries)


def mixed_decode(
    query: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: DecodeTables,
    block_table: torch.Tensor,
    query_rows: torch.Tensor,
    lengths: torch.Tensor,
    leases: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    workspace: DecodeWorkspace,
    lse: torch.Tensor | None = None,
    recent: torch.Tensor | None = None,
) -> None:
    """Attention of single-token queries over leases and full-dimension tokens.

    As :func:`mdkv_vllm.triton_kernels.mixed_decode.mixed_decode`, which documents the arguments,
    on the current stream and without synchronising. The kernel multiplies in the cache's type.

    Raises:
        CudaKernelError: an argument is of another type or layout than the kernel takes.
    """
    _check_tensors(query, arena, tables, block_table, query_rows, lengths, leases, output, lse)
    _check_recent(query, recent)
    layers = tables.shape.layout.num_layers
    if not 0 <= layer < layers:
        raise CudaKernelError(f"layer: {layer}; the cache has {layers} layers")
    if len(query) > workspace.max_queries:
        raise CudaKernelError(
            f"query: {len(query)} queries; the workspace is for {workspace.max_queries}"
        )
    call = _Call(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        _ELEMENT[query.dtype],
        len(query),
        arena.data_ptr(),
        layer,
        scale,
        block_table.data_ptr(),
        block_table.stride(0),
        query_rows.data_ptr(),
        lengths.data_ptr(),
        leases.data_ptr(),
        tables.basis_keys[layer].data_ptr(),
        tables.basis_values[layer].data_ptr(),
        output.data_ptr(),
        output.stride(0),
        output.stride(1),
        None if lse is None else lse.data_ptr(),
        None if recent is None else recent.data_ptr(),
        workspace.memory.data_ptr(),
    )
    on_gpu = query.device.type == "cuda"
    stream = torch.cuda.current_stream(query.device).cuda_stream if on_gpu else 0
    with _on(query.device):
        _check(
            library().mdkv_cuda_mixed_decode(
                ctypes.byref(tables.struct),
                ctypes.byref(workspace.plan),
                ctypes.byref(call),
                ctypes.c_void_p(stream),
            )
        )


def _on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """The device made current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_tensors(
    query: torch.Tensor,
    arena: torch.Tensor,
    tables: DecodeTables,
    block_table: torch.Tensor,
    query_rows: torch.Tensor,
    lengths: torch.Tensor,
    leases: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Whatever can be seen without looking at the device's memory."""
    layout = tables.shape.layout
    heads, size = layout.num_kv_heads * tables.shape.group, layout.geometry.head_size
    queries = len(query)
    for name, tensor in (("query", query), ("output", output)):
        if tuple(tensor.shape) != (queries, heads, size) or tensor.stride(2) != 1:
            raise CudaKernelError(
                f"{name}: shape {list(tensor.shape)}, strides {list(tensor.stride())}; expected "
                f"[{queries}, {heads}, {size}], last dimension contiguous"
            )
    if output.dtype != query.dtype or query.dtype not in _ELEMENT:
        raise CudaKernelError(
            f"query, output: {query.dtype} and {output.dtype}; expected both float32, float16 or "
            "bfloat16"
        )
    page = (layout.pages_per_block, layout.geometry.block_size, 2 * size)
    if arena.dtype != layout.geometry.dtype or tuple(arena.shape[1:]) != page:
        raise CudaKernelError(
            f"arena: {arena.dtype} {list(arena.shape)}; expected {layout.geometry.dtype} "
            f"[blocks, {', '.join(map(str, page))}]"
        )
    if not arena.is_contiguous() or arena.data_ptr() % _NEEDS_BYTES:
        raise CudaKernelError("arena: must be contiguous and 16-byte aligned")
    integers = {
        "block_table": (block_table, 2),
        "query_rows": (query_rows, 1),
        "lengths": (lengths, 1),
        "leases": (leases, 2),
    }
    for name, (tensor, dims) in integers.items():
        if tensor.dtype != torch.int32 or tensor.dim() != dims or not _dense(tensor):
            raise CudaKernelError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; expected int32 of {dims} "
                "dimensions, last one contiguous"
            )
    if len(query_rows) < queries or len(lengths) < queries or not leases.is_contiguous():
        raise CudaKernelError("query_rows, lengths: one for every query; leases: contiguous")
    if lse is not None and (
        lse.dtype != torch.float32 or tuple(lse.shape) != (queries, heads) or not _dense(lse)
    ):
        raise CudaKernelError(
            f"lse: {lse.dtype} {list(lse.shape)}; expected contiguous float32 [{queries}, {heads}]"
        )


def _check_recent(query: torch.Tensor, recent: torch.Tensor | None) -> None:
    if recent is None:
        return
    same = recent.dtype == query.dtype and recent.shape == query.shape
    if not same or not recent.is_contiguous():
        raise CudaKernelError(
            f"recent: {recent.dtype} {list(recent.shape)}; expected contiguous {query.dtype} "
            f"{list(query.shape)}"
        )


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
