"""Faults that a rehearsal plants in a kernel, to see that a stage survives and reports them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig, DecodeKernel, MakeDecode

FAULTS = ("wrong", "raises", "hangs", "aborts")

_armed = ""


def arm(fault: str) -> None:
    """Plant a fault in every kernel that this process makes from here on; none where empty."""
    global _armed
    _armed = fault


def around(make: MakeDecode) -> MakeDecode:
    """What makes a decode kernel with the planted fault in it."""
    if not _armed:
        return make

    def faulty(config: DecodeConfig) -> DecodeKernel:
        return _Faulty(make(config))

    return faulty


class _Faulty:
    def __init__(self, kernel: DecodeKernel) -> None:
        self._kernel = kernel

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
        recent: torch.Tensor | None = None,
    ) -> None:
        self._kernel.attend(query, layer, batch, output, lse, recent)
        _break(output)

    def scratch(self) -> Sequence[torch.Tensor]:
        return self._kernel.scratch()


def _break(output: torch.Tensor) -> None:
    if _armed == "wrong":
        output.mul_(1.5)
    elif _armed == "raises":
        raise RuntimeError("planted: an illegal memory access was encountered")
    elif _armed == "hangs":
        time.sleep(3600)
    else:
        os.abort()
