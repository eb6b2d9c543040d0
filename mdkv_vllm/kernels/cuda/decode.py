"""Decode attention in CUDA, called through the library's C interface."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import torch

from mdkv_vllm.kernels.cuda.library import (
    ELEMENT,
    Call,
    CudaKernelError,
    Plan,
    check,
    library,
    shape_of,
)
from mdkv_vllm.kernels.gpu_decode import GpuDecode, basis_in_use
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig

_NEEDS_BYTES = 16
"""Alignment of the cache and the workspace."""


class CudaDecode(GpuDecode):
    """:class:`mdkv_vllm.kernels.interface.DecodeKernel` in CUDA; multiplies in the cache's type.

    One workspace serves all layers, one call at a time.

    Args:
        config: the model.
        programs: warps that share a batch; None for all that the device has room for at once.

    Raises:
        CudaKernelError: the shape is not built, or the library is not there.
        ValueError: the basis has fewer directions than a format reads.
    """

    def __init__(self, config: DecodeConfig, programs: int | None = None) -> None:
        super().__init__(config)
        device = config.kv_cache.device
        basis, rank = basis_in_use(config)
        self._basis_keys, self._basis_values = basis.rows(device)
        self._shape = shape_of(config.layout, config.group, rank, config.max_leases)
        self._plan = Plan()
        size = ctypes.c_size_t()
        with _on(device):
            check(
                library().mdkv_cuda_make_plan(ctypes.byref(self._shape), ctypes.byref(self._plan))
            )
        if programs is not None:
            self._plan.warps = programs
        check(
            library().mdkv_cuda_workspace_bytes(
                ctypes.byref(self._shape),
                ctypes.byref(self._plan),
                config.max_queries,
                ctypes.byref(size),
            )
        )
        self._workspace = torch.empty(size.value, dtype=torch.uint8, device=device)

    @property
    def plan(self) -> Plan:
        """How the kernel runs on the device: warps, stages, bytes of shared memory."""
        return self._plan

    def scratch(self) -> tuple[torch.Tensor, ...]:
        """See :class:`mdkv_vllm.kernels.interface.DecodeKernel`."""
        return (self._workspace,)

    def _launch(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        recent: torch.Tensor | None,
    ) -> None:
        config = self._config
        _check_tensors(query, config, batch, output, lse)
        _check_recent(query, recent)
        layers = config.layout.num_layers
        if not 0 <= layer < layers:
            raise CudaKernelError(f"layer: {layer}; the cache has {layers} layers")
        call = Call(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            ELEMENT[query.dtype],
            len(query),
            config.kv_cache.data_ptr(),
            layer,
            config.scale,
            batch.block_table.data_ptr(),
            batch.block_table.stride(0),
            batch.query_rows.data_ptr(),
            batch.lengths.data_ptr(),
            batch.leases.data_ptr(),
            self._basis_keys[layer].data_ptr(),
            self._basis_values[layer].data_ptr(),
            output.data_ptr(),
            output.stride(0),
            output.stride(1),
            None if lse is None else lse.data_ptr(),
            None if recent is None else recent.data_ptr(),
            self._workspace.data_ptr(),
        )
        on_gpu = query.device.type == "cuda"
        stream = torch.cuda.current_stream(query.device).cuda_stream if on_gpu else 0
        with _on(query.device):
            check(
                library().mdkv_cuda_mixed_decode(
                    ctypes.byref(self._shape),
                    ctypes.byref(self._plan),
                    ctypes.byref(call),
                    ctypes.c_void_p(stream),
                )
            )


def _on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """The device made current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_tensors(
    query: torch.Tensor,
    config: DecodeConfig,
    batch: DecodeBatch,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Whatever can be seen without looking at the device's memory."""
    layout, kv_cache = config.layout, config.kv_cache
    heads, size = layout.num_kv_heads * config.group, layout.geometry.head_size
    queries = len(query)
    for name, tensor in (("query", query), ("output", output)):
        if tuple(tensor.shape) != (queries, heads, size) or tensor.stride(2) != 1:
            raise CudaKernelError(
                f"{name}: shape {list(tensor.shape)}, strides {list(tensor.stride())}; expected "
                f"[{queries}, {heads}, {size}], last dimension contiguous"
            )
    if output.dtype != query.dtype or query.dtype not in ELEMENT:
        raise CudaKernelError(
            f"query, output: {query.dtype} and {output.dtype}; expected both float32, float16 or "
            "bfloat16"
        )
    page = (layout.pages_per_block, layout.geometry.block_size, 2 * size)
    if kv_cache.dtype != layout.geometry.dtype or tuple(kv_cache.shape[1:]) != page:
        raise CudaKernelError(
            f"kv_cache: {kv_cache.dtype} {list(kv_cache.shape)}; expected {layout.geometry.dtype} "
            f"[blocks, {', '.join(map(str, page))}]"
        )
    if not kv_cache.is_contiguous() or kv_cache.data_ptr() % _NEEDS_BYTES:
        raise CudaKernelError("kv_cache: must be contiguous and 16-byte aligned")
    integers = {
        "block_table": (batch.block_table, 2),
        "query_rows": (batch.query_rows, 1),
        "lengths": (batch.lengths, 1),
        "leases": (batch.leases, 3),
    }
    for name, (tensor, dims) in integers.items():
        if tensor.dtype != torch.int32 or tensor.dim() != dims or not _dense(tensor):
            raise CudaKernelError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; expected int32 of {dims} "
                "dimensions, last one contiguous"
            )
    too_few = min(len(batch.query_rows), len(batch.lengths)) < queries
    if too_few or not batch.leases.is_contiguous():
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
