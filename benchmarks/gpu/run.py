"""Check, time and profile the GPU kernels, with torch and triton alone: one stage at a time.

    python benchmarks/gpu/run.py --stage check --json results/check.jsonl

Exit status 1 where something failed or was not done, 2 where there is no GPU; missed aims are told.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
# Instead of this file's folder: a checkout needs no installation.
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from benchmarks.gpu.jobs import Ended
    from benchmarks.gpu.stages import Stage

STAGES = ("check", "decode", "compress", "profile", "sanitize", "full")
SUMMARY_SECONDS = 5
"""Of a stage's time, kept for its report."""
OUTPUTS, OUTPUT_LINES = 6, 8
"""Of jobs that did not end well, what is printed; the JSON has more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage of the kit; its exit status."""
    began = time.monotonic()
    options = _options(arguments)
    _prepare(options.rehearse)
    if missing := _missing(options.rehearse):
        print(f"gpu/run.py: {missing}", file=sys.stderr)
        return 2
    stage: Stage = importlib.import_module(f"benchmarks.gpu.stages.{options.stage}").STAGE
    seconds = options.deadline or stage.seconds
    return _run(stage, options, began + seconds - min(SUMMARY_SECONDS, seconds / 2))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--json", type=Path, help="file for every row as it comes, a line each")
    parser.add_argument("--deadline", type=float, help="seconds in all; by default the stage's own")
    parser.add_argument(
        "--loads", nargs="+", default=[], help="stage decode: BATCHxTOKENS instead of the usual"
    )
    parser.add_argument("--seed", type=int, help="of the inputs; drawn afresh otherwise")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, to test the kit itself"
    )
    parser.add_argument(
        "--plant", nargs="+", default=[], help="rehearsal: faults, as JOB=FAULT (see plant.py)"
    )
    options = parser.parse_args(arguments)
    if options.plant and not options.rehearse:
        parser.error("--plant is for --rehearse alone")
    if options.seed is None:
        options.seed = random.randrange(2**31)
    return options


def _prepare(rehearse: bool) -> None:
    """Set what jobs take from the environment when they import torch and triton."""
    named = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), named] if named else [str(ROOT)])
    if rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "MDKV_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}


def _missing(rehearse: bool) -> str:
    """What the kit needs and does not find, or nothing."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error}; it needs torch and triton"
    if rehearse or torch.cuda.is_available():
        return ""
    return "torch sees no CUDA GPU here; nothing was run"


def _run(stage: Stage, options: argparse.Namespace, deadline: float) -> int:
    from benchmarks.gpu.device import device
    from benchmarks.gpu.jobs import Ended, run_jobs
    from benchmarks.gpu.loads import parse_loads
    from benchmarks.gpu.record import Record
    from benchmarks.gpu.stages import Options

    try:
        loads = parse_loads(options.loads)
    except ValueError as error:
        print(f"gpu/run.py: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    record = Record(options.json)
    facts = _versions() | device().facts() | {"stage": options.stage, "seed": options.seed}
    record.write(kind="machine", **facts)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    asked = Options(options.seed, options.workers, options.rehearse, loads=loads)
    rows, ended = [], []
    plants = dict(plant.split("=", 1) for plant in options.plant)
    for event in run_jobs(stage.jobs(asked), options.workers, deadline, plants):
        if isinstance(event, Ended):
            ended.append(event)
            record.write(
                kind="ended", job=event.job.name, state=event.state, seconds=event.seconds,
                output=event.output,
            )  # fmt: skip
            print(
                f"[{time.monotonic() - began:5.0f} s] {event.job.name}: {event.state}", flush=True
            )
        else:
            job, row = event
            rows.append(row)
            record.write(job=job.name, **row)
    _report(stage.report(rows, ended), ended)
    return 0 if all(end.ok for end in ended) else 1


def _report(lines: Sequence[str], ended: Sequence[Ended]) -> None:
    """What did not end well, with its output, then the lines that matter."""
    bad = [end for end in ended if not end.ok]
    for end in [end for end in bad if end.output][:OUTPUTS]:
        print(
            "\n".join([f"\n{end.job.name}: {end.state}", *end.output.splitlines()[-OUTPUT_LINES:]])
        )
    print()
    print("\n".join(lines))
    for end in bad:
        print(f"NOT DONE {end.job.name}: {end.state}")
    print(f"{len(ended) - len(bad)} of {len(ended)} jobs done", flush=True)


def _versions() -> dict[str, str]:
    import platform

    import torch
    import triton

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
