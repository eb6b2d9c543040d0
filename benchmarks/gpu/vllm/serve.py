"""vLLM end to end on a bare GPU machine, from the folder that bundle.py makes.

    python benchmarks/gpu/vllm/serve.py --bundle results/gpu-vllm --json results/gpu/vllm.jsonl

A process and a limit per engine, results after each part of each; exit status 1 where one failed or
was not done.
"""

from __future__ import annotations

import argparse
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)

SECONDS = 120
"""Of an engine."""
DEADLINE = 290
"""Of all."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # The process that jobs are forked from would else find the checkout before the bundle.
    "PYTHONSAFEPATH": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engines; the exit status."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bundle", type=Path, help="folder of bundle.py; none where vLLM is installed"
    )
    parser.add_argument("--json", type=Path, help="file for every row as it comes, a line each")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds in all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of an engine at most")
    parser.add_argument("--engines", nargs="+", help="names of some; all unless given")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny model")
    options = parser.parse_args(arguments)
    site = Path(tempfile.mkdtemp(prefix="site-")) if options.bundle else None
    if site is not None:
        unpack(options.bundle, site)
        # The bundle's package has the CUDA kernels, the checkout's may not.
        sys.path[:] = [*sys.path[1:], str(site), str(ROOT)]
    places = [*([str(site)] if site else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    print(f"unpacked in {time.monotonic() - began:.0f} s", flush=True)
    return _run(options, began + options.deadline)


def unpack(bundle: Path, site: Path, python: str = sys.executable) -> None:
    """Make a folder of packages of a bundle, for the Python that is to import them."""
    for name in ("vllm.tar.xz", "mdkv.tar.xz"):
        with lzma.open(bundle / name) as packed, tarfile.open(fileobj=packed) as tar:
            tar.extractall(site, filter="data")
    extensions = bundle / "extensions"
    unpacking = []
    for path in extensions.rglob("*.xz"):
        target = site / path.relative_to(extensions).with_suffix("")
        unpacking.append(subprocess.Popen(["xz", "-dc", path], stdout=target.open("wb")))
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--target", site, *sorted((bundle / "wheels").glob("*.whl"))]
    subprocess.run(command, check=True)
    for process in unpacking:
        if process.wait():
            raise SystemExit(f"serve.py: {process.args} failed")


def engines(rehearse: bool) -> list[Any]:
    """Those to run, in order of worth; stock's answers are what others are compared with."""
    from benchmarks.gpu.vllm.engines import Engine

    def ours(budget: float, **more: Any) -> dict[str, Any]:  # noqa: ANN401
        settings = {"mixeddim": {"budget": budget, "heads": "even"}}
        return {"attention_backend": "mixeddim", "additional_config": settings, **more}

    if rehearse:
        return [
            Engine("stock", {}),
            Engine("ours, 100 %", ours(1.0)),
            Engine("no such backend", {"attention_backend": "NONE_SUCH"}),
            Engine("ours, 25 %", ours(0.25)),
        ]
    stock = {"attention_backend": "FLASH_ATTN"}
    return [
        Engine("stock", stock),
        Engine("ours, 100 %", ours(1.0)),
        Engine("ours, 25 %", ours(0.25)),
        Engine("ours, 12.5 %", ours(0.125)),
        Engine("ours, 100 %, no graphs", ours(1.0, enforce_eager=True), loaded=False),
        Engine("ours, 100 %, chunks", ours(1.0, max_num_batched_tokens=2048), loaded=False),
        Engine("stock fp8", stock | {"kv_cache_dtype": "fp8"}),
        Engine("stock int4", {"kv_cache_dtype": "int4_per_token_head"}),
    ]  # fmt: skip


def _run(options: argparse.Namespace, deadline: float) -> int:
    from benchmarks.gpu.jobs import Ended, Job, run_jobs
    from benchmarks.gpu.record import Record
    from benchmarks.gpu.vllm.engines import H100, REHEARSED, run

    sizes = REHEARSED if options.rehearse else H100
    chosen = [
        engine for engine in engines(options.rehearse)
        if not options.engines or engine.name in options.engines
    ]  # fmt: skip
    model = Path(tempfile.mkdtemp(prefix="model-"))
    jobs = [
        Job(engine.name, run, (engine, sizes, model, options.seed), options.seconds, alone=True)
        for engine in chosen
    ]
    record, rows, ended = Record(options.json), [], []
    for event in run_jobs(jobs, 1, deadline):
        if isinstance(event, Ended):
            ended.append(event)
            told = {"state": event.state, "seconds": event.seconds, "output": event.output}
            record.write(kind="ended", job=event.job.name, **told)
            print(f"{event.job.name}: {event.state}, {event.seconds:.0f} s", flush=True)
        else:
            rows.append(event[1])
            record.write(**event[1])
    for end in ended:
        if not end.ok:
            print("\n".join([f"\n{end.job.name}: {end.state}", *end.output.splitlines()[-8:]]))
    print("\n".join(report(rows)))
    for end in ended:
        if not end.ok:
            print(f"NOT DONE {end.job.name}: {end.state}")
    return 0 if all(end.ok for end in ended) else 1


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per engine: what it does, and ratios to stock's."""
    parts: dict[str, dict[str, Any]] = {}
    for row in rows:
        parts.setdefault(row["engine"], {})[row["part"]] = row
    stock = parts.get("stock", {})
    lines = [""]
    for name, found in parts.items():
        start = found["start"]
        told = [f"{name}: started in {start['seconds']:.0f} s ({start['kernels']})"]
        if "compare" in found and "compare" in stock and name != "stock":
            told.append(_agreement(found["compare"], stock["compare"]))
        for part, key, unit in (("alone", "first_token", "s to the first token alone"),
                                ("alone", "per_token", "s a token alone"),
                                ("full", "output_tokens_per_second", "tokens/s full"),
                                ("full", "per_token", "s a token full"),
                                ("full", "resident", "resident"),
                                ("full", "preemptions", "preemptions")):  # fmt: skip
            if part in found:
                value, base = found[part][key], stock.get(part, {}).get(key)
                times = f" ({value / base:.2f} x)" if base and name != "stock" else ""
                told.append(f"{value:.4g} {unit}{times}")
        lines.append("; ".join(told))
    return lines


def _agreement(ours: dict[str, Any], stock: dict[str, Any]) -> str:
    """First tokens alike, and how far log-probabilities are apart while tokens are alike."""
    both = list(zip(ours["tokens"], stock["tokens"], strict=True))
    first = sum(a[0] == b[0] for a, b in both)
    alike = sum(a == b for a, b in both)
    apart = 0.0
    for a, b, p, q in zip(ours["tokens"], stock["tokens"], ours["logprobs"], stock["logprobs"],
                          strict=True):  # fmt: skip
        for one, other, x, y in zip(a, b, p, q, strict=True):
            if one != other:
                break
            apart = max(apart, abs(x - y))
    return (
        f"first tokens {first} of {len(both)} as stock's, answers {alike}, log-probabilities "
        f"within {apart:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
