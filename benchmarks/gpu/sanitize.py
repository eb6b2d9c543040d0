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

import torch

from mdkv_vllm.testing import leases
from mdkv_vllm.testing.leases import Model

from .call import TRITON, kernel_named
from .check import EVERY_FORMAT
from .compress_check import CASES, check_compression
from .device import device, rehearsing
from .trial import Trial

REHEARSED = Model(
    ("i8", "full"), 64, 1, kv_heads=1, block_size=4, query_dtype=torch.bfloat16, max_leases=2
)
SEVERAL_LEASES = Model(EVERY_FORMAT, query_dtype=torch.bfloat16, max_leases=3)
TOOLS = ("memcheck", "racecheck", "synccheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_ROOT = Path(__file__).resolve().parents[2]


class NoSanitizerError(Exception):
    """compute-sanitizer is not there, or did not run to its end."""


@dataclass(frozen=True)
class Finding:
    """What one tool said.

    Attributes:
        kernel: the implementation.
        tool: of compute-sanitizer.
        planted: whether a fault had been planted.
        errors: how many it counted.
        message: the end of what it printed, where it is not as it should be.
    """

    kernel: str
    tool: str
    planted: bool
    errors: int
    message: str

    @property
    def failed(self) -> bool:
        """Whether a fault was found that is there, or one was missed."""
        return (self.errors == 0) == self.planted

    @property
    def text(self) -> str:
        """One line of a report."""
        name = f"{self.kernel} {self.tool}{', planted fault' if self.planted else ''}"
        return f"{name}: {self.errors} errors{', FAILED' if self.failed else ''}"


def small_case(kernel: str, planted: bool) -> None:
    """Decode once, with every format, by the kernel of that name; this runs under the tool.

    Beside Triton's, compress a short prompt.
    """
    model = REHEARSED if rehearsing() else SEVERAL_LEASES
    case = leases.Case(model, leases.ragged(model), torch.seed() % 2**31)
    trial = Trial(case, len(case.totals), device().where, kernel_named(kernel))
    trial.load(range(len(case.totals)), case.totals)
    if planted:
        trial.block_table[1] = len(case.kv_cache) + 10**5
    trial.launch()
    device().synchronize()
    if planted:
        return
    if wrong := trial.errors().wrong:
        raise AssertionError(wrong)
    if kernel == TRITON.name and not rehearsing():
        prompt = replace(CASES[0], tokens=300, layers=1, kv_heads=2)
        if failed := check_compression(prompt, device().where.type, torch.seed() % 2**31).failures:
            raise AssertionError(failed)


def sanitize(kernel: str, tool: str, planted: bool) -> Finding:
    """Run the small case under a tool.

    Raises:
        NoSanitizerError: compute-sanitizer is not on the PATH, or did not run to its end.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise NoSanitizerError(
            "compute-sanitizer is not on the PATH; memory accesses are not checked"
        )
    options = ["--tool", tool, "--print-limit", "5"]
    if tool == "memcheck":
        # torch asks the driver for things that it may not have.
        options += ["--report-api-errors", "no"]
    child = f"from benchmarks.gpu.sanitize import small_case; small_case({kernel!r}, {planted})"
    # Without torch's own pool of memory, every tensor has bounds that the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        [sanitizer, *options, sys.executable, "-c", child],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return finding(kernel, tool, planted, (done.returncode, done.stdout))


def finding(kernel: str, tool: str, planted: bool, run: tuple[int, str]) -> Finding:
    """Read what a tool printed.

    Args:
        kernel: the implementation.
        tool: of compute-sanitizer.
        planted: whether a fault had been planted.
        run: exit status and output.

    Raises:
        NoSanitizerError: it did not run to its end.
    """
    status, text = run
    counts: Sequence[str] = _SUMMARY.findall(text)
    end = "\n".join(text.splitlines()[-30:])
    if not counts or status < 0 or "not supported" in text:
        raise NoSanitizerError(f"{tool} did not run to its end:\n{end}")
    errors = int(counts[-1])
    if not planted and errors == 0 and status != 0:
        errors = 1  # the tool found nothing, but the case itself failed
    return Finding(kernel, tool, planted, errors, end if errors else "")
