"""Check, sanitise and time decoding and compression on a GPU, with torch and triton alone.

    python benchmarks/gpu/run.py --json results/gpu.json

Exit status 1 where a check failed, 2 where there is no GPU; missed aims are only told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PARTS = ("check", "sanitize", "compress", "time")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kit; its exit status."""
    options = _options(arguments)
    missing = _missing()
    if missing:
        print(f"gpu/run.py: {missing}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    seed = random.randrange(2**31) if options.seed is None else options.seed
    results: dict[str, Any] = {"machine": machine(), "seed": seed, "quick": options.quick}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), f"seed {seed}")
    results["cuda_kernels"], failures = _build(options)
    print(results["cuda_kernels"], flush=True)
    for part in options.only:
        started = time.monotonic()
        if part == "check":
            failures += _check(results, options)
        elif part == "sanitize":
            failures += _sanitize(results)
        elif part == "compress":
            failures += _compress(results)
        else:
            failures += _time(results, options, deadline)
        results.setdefault("seconds", {})[part] = round(time.monotonic() - started, 1)
        _write(results, options.json)
    print(f"{failures} failures; seconds: {results['seconds']}")
    return 1 if failures else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("--quick", action="store_true", help="fewer variants, loads and budgets")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=7.5, help="no load is started later")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn afresh otherwise")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    return parser.parse_args(arguments)


def _missing() -> str:
    """What the kit needs and does not find, or nothing."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error}; it needs torch and triton"
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU here; nothing was run"


def machine() -> dict[str, Any]:
    """The GPU and the versions of what runs on it."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True).stdout.split()
        driver = told[0] if told else driver
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def _build(options: argparse.Namespace) -> tuple[str, int]:
    from gpu.build import build

    return build(options.workers)


def _check(results: dict[str, Any], options: argparse.Namespace) -> int:
    from itertools import chain

    from gpu.check import check_all
    from gpu.compress_check import check_all_compression
    from gpu.report import plain

    outcomes = []
    how = options.quick, results["seed"], options.workers
    for outcome in chain(check_all(*how), check_all_compression(*how)):
        outcomes.append(plain(vars(outcome)))
        state = "; ".join(outcome.failures) or "ok"
        print(f"check {outcome.name}: error {outcome.error:.1e}, {state}", flush=True)
    results["checks"] = outcomes
    return sum(bool(outcome["failures"]) for outcome in outcomes)


def _sanitize(results: dict[str, Any]) -> int:
    from gpu.sanitize import find_all

    findings = find_all()
    if findings is None:
        print("compute-sanitizer is not installed; memory accesses were not checked")
        results["sanitizer"] = None
        return 0
    for found in findings:
        print(found.text, flush=True)
        if found.failed:
            print(found.message)
    results["sanitizer"] = [vars(found) for found in findings]
    return sum(found.failed for found in findings)


def _compress(results: dict[str, Any]) -> int:
    import torch

    from gpu.compress_time import time_compression

    results["compression"] = []
    try:
        generator = torch.Generator("cuda").manual_seed(results["seed"])
        for timed in time_compression(generator):
            results["compression"].append(timed.as_json())
            print("\n".join(timed.lines), flush=True)
    except Exception:  # the other parts are worth having
        traceback.print_exc()
        return 1
    return 0


def _time(results: dict[str, Any], options: argparse.Namespace, deadline: float) -> int:
    import torch

    from gpu.loads import all_holdings, all_loads
    from gpu.measure import compile_all, measure_all
    from gpu.report import OURS, Row, aims, comparison, table

    rows: list[Row] = []
    skipped: list[str] = []
    failures = 0
    try:
        loads, holdings = list(all_loads(options.quick)), all_holdings(options.quick)
        compile_all(loads, holdings, options.workers)
        generator = torch.Generator("cuda").manual_seed(results["seed"])
        for row in measure_all(loads, holdings, generator, deadline, skipped):
            rows.append(row)
            print(row.line, flush=True)
    except Exception as error:  # what was timed before is worth reporting
        traceback.print_exc()
        skipped.append(f"everything after {type(error).__name__}: {error}")
        failures = 1
    reached = aims(rows)
    results["rows"] = [row.as_json() for row in rows]
    results["skipped"] = skipped
    results["aims"] = [vars(aim) for aim in reached]
    print("\n".join(f"skipped {what}" for what in skipped))
    for kernel in OURS:
        if any(row.kernel == kernel for row in rows):
            print(f"{kernel}: time over the best full cache's, and share of the copy's rate")
            for kinds in (("int", "rank"), ("full", "mixed")):
                print(f"\n{table(rows, kinds, kernel)}")
    rates = [row.copy_rate for row in rows]
    if rates:
        print(f"copy: {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GB/s, read plus written")
    print(comparison(rows))
    print("\n".join(aim.line for aim in reached))
    return failures


def _write(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
