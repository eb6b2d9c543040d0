"""Compile the CUDA kernels as C++ for this machine's CPU; see cuda_host.h."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-DMDKV_ON_HOST", f"-I{HERE}"]


def build(folder: Path, sources: Path = SOURCES) -> Path:
    """Build the library in a folder; its path."""
    jobs = {f"attend_{d}": ("attend.cu", f"-DMDKV_HEAD_SIZE={d}") for d in GPU_HEAD_SIZES}
    jobs["mixed_decode"] = ("mixed_decode.cu", "-DMDKV_NONE")

    compiler = os.environ.get("CXX", "g++")

    def compile_one(name: str, source: Path, flag: str) -> Path:
        to = folder / f"{name}.o"
        command = [compiler, *FLAGS, f"-I{sources}", flag, "-x", "c++", "-c", source, "-o", to]
        subprocess.run(command, check=True)
        return to

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(compile_one, n, sources / s, f) for n, (s, f) in jobs.items()]
        tasks.append(pool.submit(compile_one, "cuda_host", HERE / "cuda_host.cpp", "-DMDKV_NONE"))
        objects = [task.result() for task in tasks]
    to = folder / "libmdkv_cuda_host.so"
    subprocess.run([compiler, "-shared", *objects, "-o", to], check=True)
    return to
