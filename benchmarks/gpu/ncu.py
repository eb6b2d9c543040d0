"""Nsight Compute on one kernel: which counters, how it is called, and what it says in words."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TIME = "gpu__time_duration.sum"
INSTRUCTIONS = "smsp__inst_executed.sum"
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"
READ = "dram__bytes_read.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
BUSY = tuple(f"sm__cycles_active.{how}" for how in ("min", "avg", "max"))
STALLS = tuple(
    f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in (
        "long_scoreboard",
        "short_scoreboard",
        "no_instruction",
        "wait",
        "math_pipe_throttle",
        "mio_throttle",
        "lg_throttle",
        "barrier",
        "not_selected",
    )
)
REGISTERS = "launch__registers_per_thread"
METRICS = (TIME, INSTRUCTIONS, ISSUE, READ, DRAM, WARPS, *BUSY, *STALLS, REGISTERS)

_ROOT = Path(__file__).resolve().parents[2]
_NANOSECONDS = {"nsecond": 1.0, "ns": 1.0, "usecond": 1e3, "us": 1e3, "msecond": 1e6, "ms": 1e6}
_BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


class NoProfileError(Exception):
    """Nsight Compute is not there, or said nothing of a kernel."""


def profile(statement: str, kernels: str, skip: int, count: int) -> list[dict[str, float | str]]:
    """Profile kernels that a Python statement launches.

    Args:
        statement: run in a process of its own, with the kit on its path.
        kernels: regular expression of their names.
        skip: launches of them that are passed over, for instance of a warm-up.
        count: launches that are profiled.

    Returns:
        For each, its ``name`` and :data:`METRICS`; times in nanoseconds, sizes in bytes.

    Raises:
        NoProfileError: with what the tool said.
    """
    tool = shutil.which("ncu")
    if tool is None:
        raise NoProfileError("ncu is not on the PATH")
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    options += ["-k", f"regex:{kernels}", "-s", str(skip), "-c", str(count)]
    done = subprocess.run(
        [tool, *options, sys.executable, "-c", statement],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
    )
    found = parse(done.stdout)
    if not found:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise NoProfileError(f"ncu profiled nothing (exit status {done.returncode}):\n{last}")
    return found


def parse(output: str) -> list[dict[str, float | str]]:
    """Read the table that ``--csv --page raw`` prints after whatever the program printed."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, units, *rows = csv.reader(lines[start:])
    return [_launch(names, units, row) for row in rows if len(row) == len(names)]


def _launch(
    names: Sequence[str], units: Sequence[str], row: Sequence[str]
) -> dict[str, float | str]:
    launch: dict[str, float | str] = {}
    for name, unit, value in zip(names, units, row, strict=True):
        if name == "Kernel Name":
            launch["name"] = value.partition("(")[0].partition("<")[0]
        elif name in METRICS:
            factor = _NANOSECONDS.get(unit, _BYTES.get(unit, 1.0))
            try:
                launch[name] = float(value.replace(",", "")) * factor
            except ValueError:
                launch[name] = float("nan")
    return launch


def in_words(title: str, launch: Mapping[str, float | str], pages: int) -> list[str]:
    """A launch as some lines of text.

    Args:
        title: what was profiled.
        launch: as :func:`profile` gives it.
        pages: that the kernel had to read; 0 where it reads none.
    """

    def number(name: str) -> float:
        return float(launch.get(name, float("nan")))

    read, seconds = number(READ), number(TIME) / 1e9
    lines = [
        f"{title} ({launch.get('name', '')}): {seconds * 1e6:.1f} us, {read / 1e6:.1f} MB read "
        f"({read / seconds / 1e9:.0f} GB/s), DRAM {number(DRAM):.0f} %, issue slots "
        f"{number(ISSUE):.0f} %, warps {number(WARPS):.0f} %, {number(REGISTERS):.0f} registers"
    ]
    if pages:
        per_page = number(INSTRUCTIONS) / pages
        lines.append(f"  {per_page:.0f} warp instructions a page, {pages} pages")
    least, mean, most = (number(name) for name in BUSY)
    lines.append(
        f"  multiprocessors busy {least / most:.0%} to 100 % of the longest, mean {mean / most:.0%}"
    )
    stalls = sorted(((number(name), name) for name in STALLS), reverse=True)
    told = ", ".join(
        f"{name.split('_stalled_')[1].removesuffix('_per_issue_active.ratio')} {value:.2f}"
        for value, name in stalls
        if value >= 0.05
    )
    return [*lines, f"  warps waiting per issue: {told or 'none'}"]
