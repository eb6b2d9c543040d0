"""Try a bundle as far as it goes without a GPU, in the GPU machine's Python, torch and triton.

    python benchmarks/gpu/vllm/try_bundle.py --bundle results/gpu-vllm --environment build/try-vllm

Makes an environment with Python 3.12, torch 2.11 and triton 3.6 (some 5 GB), unpacks the bundle as
serve.py does, puts an empty driver library beside it and answers for NVML: one H100. Then vLLM's
extensions are loaded, our platform is chosen, every engine of serve.py is configured, what a worker
imports is imported, and the kit's calls of FlashAttention 3 are compared with its operations.
Nothing runs on a GPU. Exit status 1 where a part fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from benchmarks.gpu.vllm.bundle import EXTENSIONS, ROOT, WHEELS  # noqa: E402
from benchmarks.gpu.vllm.serve import ENVIRONMENT, unpack  # noqa: E402

MACHINE = ("torch==2.11.0", "triton==3.6.0")
"""What the GPU machine has."""
NOT_THERE = (
    "cuda-", "flashinfer", "humming", "instanttensor", "nccl", "nvidia-", "pynvvideocodec", "quack",
    "tilelang", "tokenspeed", "torch", "triton", "vllm",
)  # fmt: skip
"""Packages of requirements/cuda.txt for GPUs that the bundle does without, by their first letters;
the machine is taken to have all others that :data:`.bundle.WHEELS` does not name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment and try the bundle in it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=ROOT / "results" / "gpu-vllm")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "try-vllm")
    parser.add_argument("--python", default="python3.12", help="a Python 3.12")
    options = parser.parse_args(arguments)
    python = make_environment(options.environment, options.python)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        unpack(options.bundle, site, python)
        stub_driver(site, Path(folder))
        environment = os.environ | ENVIRONMENT
        environment["PYTHONPATH"] = os.pathsep.join((str(site), str(ROOT)))
        environment["LD_LIBRARY_PATH"] = folder
        inside = Path(__file__).with_name("inside.py")
        return subprocess.run([python, inside, *EXTENSIONS], env=environment).returncode


def make_environment(folder: Path, python: str) -> str:
    """An environment like the GPU machine's; its interpreter."""
    inside = str(folder / "bin" / "python")
    done = folder / "made"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _run([python, "-m", "venv", str(folder)])
        install = [inside, "-m", "pip", "install", "--quiet"]
        _run([*install, *MACHINE])
        _run([*install, "--no-deps", *taken_for_granted()])
        done.touch()
    return inside


def taken_for_granted() -> list[str]:
    """Of requirements/cuda.txt, what is neither for GPUs nor in the bundle."""
    lines = (ROOT / "requirements" / "cuda.txt").read_text().splitlines()
    pinned = [line.strip() for line in lines if "==" in line and not line.startswith("#")]
    return [
        line
        for line in pinned
        if not line.startswith(NOT_THERE) and line.split("==")[0] not in WHEELS
    ]


def stub_driver(site: Path, folder: Path) -> None:
    """A libcuda.so.1 with every function that the extensions need, none of which does anything."""
    needed = set()
    for name in EXTENSIONS:
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", site / name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = (line.split()[-1] for line in listed.splitlines())
        needed |= {name for name in names if re.match("cu[A-Z]", name)}
    source = folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(needed)))
    library = folder / "libcuda.so.1"
    _run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
