"""Build the CUDA kernels for the GPU that is there, if nvcc is there too."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import torch

from mdkv_vllm.ops import cuda

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build-cuda.sh"


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc calls a compute capability; Hopper's own instructions need an ``a``."""
    major, minor = capability
    return f"{major}{minor}{'a' if major == 9 else ''}"


def build(jobs: int) -> tuple[str, int]:
    """Build, with some compilers at once.

    Returns:
        What came of it, in words; and 1 where there is a compiler, but no kernels.
    """
    started = time.monotonic()
    done = subprocess.run(
        [SCRIPT, architecture(torch.cuda.get_device_capability())],
        env=os.environ | {"JOBS": str(jobs)},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    return outcome(done.returncode, done.stderr, seconds, cuda.why_not())


def outcome(status: int, message: str, seconds: float, why_not: str) -> tuple[str, int]:
    """See :func:`build`.

    Args:
        status: of the script.
        message: what it said.
        seconds: how long it took.
        why_not: why the kernels cannot be used; empty if they can.
    """
    if status == 0 and not why_not:
        return f"CUDA kernels: built in {seconds:.0f} s", 0
    if status == 0:
        return f"CUDA kernels: built, but {why_not}", 1
    last = "\n".join(message.splitlines()[-20:])
    if not why_not:
        return f"CUDA kernels: an earlier build is used, since\n{last}", 0
    return f"CUDA kernels: none, {last}", 0 if "no nvcc found" in message else 1
