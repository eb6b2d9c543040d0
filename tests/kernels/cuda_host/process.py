"""The CUDA kernels on a CPU in a process of their own, which they end where they go wrong."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ORDERS = {
    "copies at once": (0, 0),
    "copies when waited for": (0, 1),
    "threads backwards": (1, 1),
}
"""How threads of a block, blocks and copies are ordered; results may not depend on it."""


def _use_library(path: Path) -> None:
    os.environ["MDKV_CUDA_LIBRARY"] = str(path)
    torch.set_num_threads(1)


def start(library: Path) -> ProcessPoolExecutor:
    """One process that runs kernels."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _use_library, (library,))


def configure(kv_cache: torch.Tensor | None, order: str) -> None:
    """Set the order of the next calls, and where they may copy from."""
    from mdkv_vllm.kernels.cuda.library import library

    begin, size = (0, 0) if kv_cache is None else (kv_cache.data_ptr(), kv_cache.nbytes)
    library().mdkv_host_configure(*ORDERS[order], ctypes.c_void_p(begin), ctypes.c_int64(size))


def shares(options, config, *call):
    """Attend once, in the process, as ``decode_runners.attend`` does.

    Returns the warp that copied each page of the cache, -1 for none, and the weights of pages, by
    list with the tail last.
    """
    from decode_runners import attend

    from mdkv_vllm.kernels.cuda.library import library

    owners = torch.full(config.kv_cache.shape[:2], -1, dtype=torch.int32)
    library().mdkv_host_owners(ctypes.c_void_p(owners.data_ptr()))
    attend("cuda", options, config, *call)
    library().mdkv_host_owners(None)
    weights = torch.empty(len(config.layout.formats.formats) + 1, dtype=torch.int32)
    library().mdkv_host_weights(ctypes.c_void_p(weights.data_ptr()))
    return owners, weights
