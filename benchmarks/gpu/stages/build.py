"""The CUDA kernels, built for the GPU that is there or taken ready-made: a job of most stages."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mdkv_vllm.kernels.cuda import library as cuda

from ..jobs import Job, Row

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "build-cuda.sh"
PREBUILT = "MDKV_CUDA_LIBRARY"
"""Environment variable: a library that is taken as it is."""
NAME = "build CUDA"


def build_job(compilers: int) -> Job:
    """Makes the CUDA kernels usable, or fails with the reason.

    Args:
        compilers: at once.
    """
    return Job(NAME, build, (compilers,), seconds=170)


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc calls a compute capability; Hopper's own instructions need an ``a``."""
    major, minor = capability
    return f"{major}{minor}{'a' if major == 9 else ''}"


def is_current(library: Path, *sources: Path) -> bool:
    """Whether a library is newer than everything that it is made of."""
    newest = max(path.stat().st_mtime for folder in sources for path in folder.iterdir())
    return library.exists() and library.stat().st_mtime > newest


def build(compilers: int) -> Iterator[Row]:
    """Build, unless a library is named or an earlier one is as new as its sources.

    Raises:
        RuntimeError: there are no kernels; with what the compiler said.
    """
    began = time.monotonic()
    if named := os.environ.get(PREBUILT):
        text = f"taken from {named}"
    elif is_current(cuda.LIBRARY, ROOT / "csrc" / "cuda", ROOT / "csrc" / "common"):
        text = "built earlier"
    else:
        done = subprocess.run(
            [SCRIPT, architecture(torch.cuda.get_device_capability())],
            env=os.environ | {"JOBS": str(compilers)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError("\n".join(done.stderr.splitlines()[-20:]))
        text = f"built in {time.monotonic() - began:.0f} s"
    cuda.library()
    yield {"kind": "build", "text": f"CUDA kernels: {text}"}
