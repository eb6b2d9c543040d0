"""Faults that a rehearsal plants in a kernel, to see that a stage survives and reports them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

FAULTS = ("wrong", "raises", "hangs", "aborts")

_armed = ""


def arm(fault: str) -> None:
    """Plant a fault in every kernel that this process calls from here on; none where empty."""
    global _armed
    _armed = fault


def around(decode: Callable[..., None]) -> Callable[..., None]:
    """A decode kernel with the planted fault in it."""
    if not _armed:
        return decode

    def faulty(*arguments: Any) -> None:  # noqa: ANN401
        decode(*arguments)
        _break(arguments[9])

    return faulty


def _break(output: torch.Tensor) -> None:
    if _armed == "wrong":
        output.mul_(1.5)
    elif _armed == "raises":
        raise RuntimeError("planted: an illegal memory access was encountered")
    elif _armed == "hangs":
        time.sleep(3600)
    else:
        os.abort()
