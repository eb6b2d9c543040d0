"""Serving under `vllm bench serve` with little KV memory: ours, stock, stock with an fp8 cache.

    python benchmarks/serving.py --model MODEL --dtype bfloat16 --out results/serving.json
    python benchmarks/serving.py --model MODEL --quick

One server after the other gets the same requests, all sent at once, and the same bytes of KV
memory: what four stock requests take in a 16-bit cache, plus the one block that vLLM never
gives to a request (128 tokens; without it stock would hold three). Stock's CPU backend keeps
its cache in the compute dtype, so with --dtype float32 stock, and only stock, gets twice the
bytes to hold the same tokens. Stock servers load no plugin.

What is measured:

- Resident at once: the largest vllm:num_requests_running, sampled every second. Stock admits
  more prompts than its memory can finish and preempts them later, so what is wanted is three
  times the requests that the memory holds.
- Decoding: engine steps that processed no prompt token. They come from the line that vLLM
  logs for each step, not from vllm:prompt_tokens_total: that counter moves when a prompt is
  complete, so chunks before its last one and prompts computed again after a preemption would
  pass for decoding. A step's time runs from the step before it to its own end; its output is
  one token per request.
- Output tokens per second while decoding: output of those steps over their time. Mean
  resident while decoding: their requests, weighted by their time.
- Step at equal numbers: median time of a decoding step by the number of requests in it,
  compared where both servers had such steps.
- Output tokens per second over the whole run, TTFT, TPOT, inter-token latency: from
  `vllm bench serve`.
- Preemptions: growth of vllm:num_preemptions_total.

Each server first answers a short and a 300-token prompt, which compile and warm it up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import STOCK_ONLY, BenchmarkError, Server, ServerSpec, Step

STOCK_BLOCK_TOKENS = 128
"""Block size of vLLM's CPU backend where none is asked for."""
SLACK_TOKENS = 32
"""`vllm bench` sends text; tokenised again it may be some tokens longer than asked."""
SAMPLE_SECONDS = 1.0
SERVERS = ("ours", "stock", "stock fp8")
SAMPLED = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "cache_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "output_tokens": "vllm:generation_tokens_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
}
LOAD = {
    "requests": ("requests sent at once", 16, 8),
    "input_len": ("tokens of a prompt", 2048, 512),
    "output_len": ("tokens to generate", 1024, 128),
    "holds": ("stock requests that the KV memory holds", 4, 2),
}
"""Options: what they mean, their default, and the same under --quick."""
WANTED = {
    "decode_tokens_per_s": "3x",
    "output_tokens_per_s": "2x",
    "p99_itl_ms": "at most 2x",
    "step_ratio": "at most 1x",
}
"""Ratios to stock that the project asks for at the full load and a budget of 25 %."""
FEWEST_STEPS = 5
"""Steps of one size below which their median says little."""


@dataclass
class Result:
    """One server's run; times in seconds where the name does not say otherwise."""

    name: str
    flags: tuple[str, ...]
    probe: str
    """Greedy answer to a short prompt; a broken cache shows here."""
    threads: int | None
    kv_bytes: int
    blocks: int = 0
    block_size: int = 0
    duration_s: float = 0.0
    resident_peak: int = 0
    resident_mean_decoding: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    preemptions: int = 0
    mean_ttft_ms: float = 0.0
    mean_tpot_ms: float = 0.0
    median_itl_ms: float = 0.0
    p99_itl_ms: float = 0.0
    step_ms: dict[int, float] = field(default_factory=dict)
    """Median milliseconds of a decoding step, by its number of requests."""
    samples: list[dict[str, float]] = field(default_factory=list)


class Sampler:
    """Reads a server's metrics every second in a thread of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[dict[str, float]] = []

    def __enter__(self) -> Sampler:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if exception[0] is None:
            self._take()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                self._take()
            except OSError as error:  # a busy server may be late once
                print(f"sample of {self._server.spec.name} missed: {error}", file=sys.stderr)

    def _take(self) -> None:
        now, metrics = time.monotonic(), self._server.metrics()
        values = {name: metrics[metric] for name, metric in SAMPLED.items()}
        self.samples.append({"at": round(now, 3)} | values)


def specs(arguments: argparse.Namespace, kv_bytes: int) -> list[tuple[ServerSpec, int]]:
    """The servers to compare, each with its bytes of KV memory."""
    length = arguments.input_len + arguments.output_len + SLACK_TOKENS
    common = ("--dtype", arguments.dtype, "--max-model-len", str(length), *arguments.server_arg)
    ours = harness.our_flags(arguments.dtype, budget=arguments.budget, **arguments.mixeddim)
    wanted = [
        ("ours", ours, {}, kv_bytes),
        ("stock", (), STOCK_ONLY, kv_bytes * (2 if arguments.dtype == "float32" else 1)),
        ("stock fp8", ("--kv-cache-dtype", "fp8"), STOCK_ONLY, kv_bytes),
    ]
    return [
        (ServerSpec(name, (*common, *flags, "--kv-cache-memory-bytes", str(size)), env), size)
        for name, flags, env, size in wanted
        if name in arguments.servers
    ]


def bench(server: Server, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run `vllm bench serve` against a server and return its JSON.

    Raises:
        BenchmarkError: it failed, or requests did.
    """
    port = server.url.rsplit(":", 1)[1]
    name = f"bench-{port}.json"
    command = [*harness.VLLM, "bench", "serve", "--backend", "openai", "--model", arguments.model]
    command += ["--host", harness.HOST, "--port", port, "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", str(arguments.input_len)]
    command += ["--random-output-len", str(arguments.output_len)]
    command += ["--num-prompts", str(arguments.requests), "--request-rate", "inf"]
    command += ["--seed", "0", "--temperature", "0", "--disable-tqdm", "--save-result"]
    command += ["--result-dir", str(folder), "--result-filename", name]
    env = dict(os.environ, HF_HUB_OFFLINE="1") | STOCK_ONLY
    log = folder / f"bench-{port}.log"
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=out, env=env, timeout=arguments.timeout)
    if done.returncode != 0:
        raise BenchmarkError(f"vllm bench serve failed on {server.spec.name}; its log is {log}")
    result = json.loads((folder / name).read_text())
    if result["completed"] != arguments.requests:
        raise BenchmarkError(f"{server.spec.name} failed requests; logs are {log}, {server.log}")
    return result


def warm_up(server: Server, model: str) -> str:
    """Make the server compile what it compiles lazily; returns its answer to a short prompt."""
    body = {"model": model, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    tokens = random.Random(1).choices(range(300, 30000), k=300)
    server.post("/v1/completions", body | {"prompt": tokens})
    answer = server.post("/v1/completions", body | {"prompt": "The capital of France is"})
    return answer["choices"][0]["text"]


def measure(spec: ServerSpec, kv_bytes: int, arguments: argparse.Namespace, folder: Path) -> Result:
    """Start a server, drive it, and stop it."""
    with harness.serve(spec, arguments.model, folder, arguments.start_timeout) as server:
        probe, cache = warm_up(server, arguments.model), server.cache_info()
        result = Result(spec.name, spec.flags, probe, server.threads, kv_bytes)
        result.blocks, result.block_size = int(cache["num_gpu_blocks"]), int(cache["block_size"])
        before = len(server.steps)
        with Sampler(server) as sampler:
            report = bench(server, arguments, folder)
        steps = server.steps[before:]
    add_steps(result, steps)
    result.samples = samples = sampler.samples
    result.resident_peak = int(max(sample["running"] for sample in samples))
    result.preemptions = int(samples[-1]["preemptions"] - samples[0]["preemptions"])
    result.duration_s = report["duration"]
    result.output_tokens_per_s = report["output_throughput"]
    for name in ("mean_ttft_ms", "mean_tpot_ms", "median_itl_ms", "p99_itl_ms"):
        setattr(result, name, report[name])
    return result


def add_steps(result: Result, steps: list[Step]) -> None:
    """Fill in what the engine's steps say about decoding."""
    resident, times = 0.0, defaultdict(list)
    # The first step has none before it to tell its time; it is a prefill anyway.
    for last, step in pairwise(steps):
        if step.only_decodes:
            seconds = step.at - last.at
            result.decode_s += seconds
            result.decode_tokens += step.requests
            resident += step.requests * seconds
            times[step.requests].append(seconds * 1e3)
    if result.decode_s > 0:
        result.decode_tokens_per_s = result.decode_tokens / result.decode_s
        result.resident_mean_decoding = resident / result.decode_s
    result.step_ms = {n: median(ms) for n, ms in times.items() if len(ms) >= FEWEST_STEPS}


def step_ratio(ours: Result, other: Result) -> str:
    """How our decoding steps compare with another's of the same numbers of requests."""
    shared = sorted(ours.step_ms.keys() & other.step_ms.keys())
    if not shared:
        return "-"
    ratio = median(ours.step_ms[n] / other.step_ms[n] for n in shared)
    return f"{ratio:.2f}x ({shared[0]} to {shared[-1]})"


def report(results: list[Result], holds: int) -> str:
    """A table of all servers, and our ratios to each stock one."""
    lines = [
        ("KV memory, MB", "kv_bytes", 1e-6, 1),
        ("blocks of it", "blocks", 1, 0),
        ("most requests resident", "resident_peak", 1, 0),
        ("mean resident, decoding", "resident_mean_decoding", 1, 2),
        ("output tok/s, decoding", "decode_tokens_per_s", 1, 1),
        ("output tok/s, whole run", "output_tokens_per_s", 1, 1),
        ("decoding, s", "decode_s", 1, 1),
        ("whole run, s", "duration_s", 1, 1),
        ("preemptions", "preemptions", 1, 0),
        ("mean TTFT, s", "mean_ttft_ms", 1e-3, 2),
        ("mean TPOT, ms", "mean_tpot_ms", 1, 1),
        ("inter-token p50, ms", "median_itl_ms", 1, 1),
        ("inter-token p99, ms", "p99_itl_ms", 1, 1),
    ]
    wanted = WANTED | {"resident_peak": str(3 * holds)}
    rows = []
    for title, name, factor, digits in lines:
        numbers = [getattr(result, name) for result in results]
        # Only what was measured is compared; zero divides nothing.
        compared = name not in ("kv_bytes", "blocks")
        ratios = [f"{numbers[0] / n:.2f}x" if compared and n else "-" for n in numbers[1:]]
        cells = [f"{number * factor:.{digits}f}" for number in numbers]
        rows.append([title, *cells, *ratios, wanted.get(name, "")])
    equal = [step_ratio(results[0], result) for result in results[1:]]
    rows.append(["step at equal numbers", *("" for _ in results), *equal, wanted["step_ratio"]])
    header = ["", *(result.name for result in results)]
    header += [f"ours/{result.name}" for result in results[1:]]
    return harness.table([*header, "wanted"], rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--mixeddim", type=json.loads, default={}, help="more settings (JSON)")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--quick", action="store_true", help="a load for minutes")
    for name, (meaning, _, _) in LOAD.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning)
    parser.add_argument("--server-arg", action="append", default=[], help="flag of all servers")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    arguments = parser.parse_args()
    for name, (_, full, quick) in LOAD.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    return arguments


def main() -> None:
    """Compare the servers."""
    arguments = parse_arguments()
    harness.prepare()
    tokens = arguments.input_len + arguments.output_len
    blocks = arguments.holds * -(-tokens // STOCK_BLOCK_TOKENS) + 1
    kv_bytes = blocks * STOCK_BLOCK_TOKENS * harness.cache_bytes_per_token(arguments.model, 2)
    described = harness.machine()
    print(json.dumps(described))
    print(
        f"{arguments.requests} requests of {arguments.input_len} + {arguments.output_len} tokens; "
        f"KV memory {kv_bytes:,} bytes: {arguments.holds} stock requests in 16 bit, and a block"
    )
    if arguments.dtype == "float32":
        print("stock's cache is float32: it gets twice the bytes, to hold the same requests")
    # Logs stay where they are: a failed run is read from them.
    folder = Path(tempfile.mkdtemp(prefix="mdkv-serving-"))
    print(f"logs: {folder}", flush=True)
    results: list[Result] = []
    for spec, size in specs(arguments, kv_bytes):
        results.append(measure(spec, size, arguments, folder))
        print(f"\n{report(results, arguments.holds)}", flush=True)
        harness.write_results(arguments.out, described, arguments, results)


if __name__ == "__main__":
    main()
