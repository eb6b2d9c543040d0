"""compute-sanitizer on small cases, and on one with a fault planted that it has to find."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import leases
import torch
from leases import Model

from .call import TRITON, Kernel, kernels
from .check import EVERY_FORMAT
from .compress_check import CASES, check_compression
from .trial import Trial

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 150
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_PLACES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finding:
    """What one tool said.

    Attributes:
        kernel: the implementation.
        tool: of compute-sanitizer.
        planted: whether a fault had been planted.
        errors: how many it counted; None where it did not run to its end.
        message: the end of what it printed, where it is not as it should be.
    """

    kernel: str
    tool: str
    planted: bool
    errors: int | None
    message: str

    @property
    def failed(self) -> bool:
        """Whether a fault was found that is there, or one was missed. Not running is no fault."""
        return self.errors is not None and (self.errors == 0) == self.planted

    @property
    def text(self) -> str:
        """One line of a report."""
        name = f"{self.kernel} {self.tool}{', planted fault' if self.planted else ''}"
        if self.errors is None:
            return f"{name}: did not run: {self.message.splitlines()[-1:]}"
        return f"{name}: {self.errors} errors{', FAILED' if self.failed else ''}"


def small_case(kernel: str, planted: bool) -> None:
    """Decode once, with every format, by the kernel of that name; this runs under the tool.

    Beside Triton's, compress a short prompt.
    """
    model = Model(EVERY_FORMAT, query_dtype=torch.bfloat16)
    case = leases.Case(model, leases.ragged(model.layout().min_blocks + 2), torch.seed() % 2**31)
    trial = Trial(case, len(case.totals), torch.device("cuda"), _named(kernel))
    trial.load(range(len(case.totals)), case.totals)
    if planted:
        trial.block_table[1] = len(case.arena) + 10**5
    trial.launch()
    torch.cuda.synchronize()
    if not planted and (wrong := trial.errors().wrong):
        raise AssertionError(wrong)
    if not planted and kernel == TRITON.name:
        prompt = replace(CASES[0], tokens=300, layers=1, kv_heads=2)
        if wrong := check_compression(prompt, "cuda", torch.seed() % 2**31).failures:
            raise AssertionError(wrong)


def _named(name: str) -> Kernel:
    return next(kernel for kernel in kernels() if kernel.name == name)


def find_all() -> list[Finding] | None:
    """Run every tool side by side; None where compute-sanitizer is not installed."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return None
    cases = [(tool, False) for tool in TOOLS] + [("memcheck", True)]
    runs = [(kernel.name, *case) for kernel in kernels() for case in cases]
    started = [(run, _start(sanitizer, *run)) for run in runs]
    return [finding(*run, _output(process)) for run, process in started]


def _start(sanitizer: str, kernel: str, tool: str, planted: bool) -> subprocess.Popen[str]:
    options = ["--tool", tool, "--print-limit", "5"]
    if tool == "memcheck":
        # torch asks the driver for things that it may not have.
        options += ["--report-api-errors", "no"]
    child = f"from gpu.sanitize import small_case; small_case({kernel!r}, {planted})"
    # Without torch's own pool of memory, every tensor has bounds that the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(_PLACES)}
    return subprocess.Popen(
        [sanitizer, *options, sys.executable, "-c", child],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _output(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        text, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        return -1, f"{text}\nnot done after {SECONDS} s"
    return process.returncode, text


def finding(kernel: str, tool: str, planted: bool, run: tuple[int, str]) -> Finding:
    """Read what a tool printed.

    Args:
        kernel: the implementation.
        tool: of compute-sanitizer.
        planted: whether a fault had been planted.
        run: exit status and output.
    """
    status, text = run
    counts: Sequence[str] = _SUMMARY.findall(text)
    end = "\n".join(text.splitlines()[-30:])
    if not counts or status < 0 or "not supported" in text:
        return Finding(kernel, tool, planted, None, end)
    errors = int(counts[-1])
    if not planted and errors == 0 and status != 0:
        errors = 1  # the tool found nothing, but the case itself failed
    return Finding(kernel, tool, planted, errors, end if errors else "")
