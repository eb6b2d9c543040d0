"""Time to the first two tokens of long prompts beside stock, and what compression costs.

    python benchmarks/prefill.py --model MODEL --dtype bfloat16 --out results/prefill.json

Three servers run at once: ours at budget 1.0 (compresses nothing), ours at --budget, and
stock without any plugin. Idle servers use no CPU; each round sends one new random prompt to
each in turn, the first one changing from round to round, and asks for two tokens. The first
comes from prefill; a compression runs before the second, which is therefore timed too.

- Compression seconds are the worker's own clock, per prompt, and their share of the median
  time to first token.
- Extra memory of a compression: the worker's peak resident set (VmHWM, reset before) during
  the first compressed prompt, less that during prompts of the same length and server which
  asked for budget 1.0. Zero means that prefill itself needs more than compression does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import (
    STOCK_ONLY,
    BenchmarkError,
    Server,
    ServerSpec,
    cache_bytes_per_token,
    machine,
    memory_of,
    our_flags,
    prepare,
    serve,
    table,
)

CACHE_PROMPTS = 3
"""Prompts that the KV cache of each server holds."""
PRECISION = {"bfloat16": 2, "float16": 2, "float32": 4}


class Prompts:
    """New random prompts of one length; no two share a prefix, so no cache helps."""

    def __init__(self, model: str, tokens: int) -> None:
        self._model = model
        self._tokens = tokens
        self._random = random.Random(0)

    def next(self) -> dict[str, Any]:
        """Body of a request for two tokens."""
        prompt = [self._random.randrange(300, 30000) for _ in range(self._tokens)]
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
        }


def token_seconds(server: Server, body: dict[str, Any]) -> tuple[float, float]:
    """Send a request for two tokens; seconds until the first and until the second."""
    started = time.perf_counter()
    times = [time.perf_counter() - started for _ in server.stream("/v1/completions", body)]
    if len(times) < 2:
        raise BenchmarkError(f"{server.spec.name} sent {len(times)} of 2 tokens one by one")
    return times[0], times[1]


def compression_totals(server: Server) -> tuple[int, float]:
    """Prompts that a server of ours has compressed, and the seconds it took."""
    answer = server.post("/collective_rpc", {"method": "mixeddim_status"})
    (status,) = answer["results"]
    return status["totals"]["prompts"], status["totals"]["seconds"]


def peak_memory(server: Server, body: dict[str, Any]) -> int:
    """Peak resident bytes of a server's worker during a request."""
    pid = server.worker_pid()
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # sets VmHWM to VmRSS, see proc(5)
    server.post("/v1/completions", body)
    return memory_of(pid)["VmHWM"]


def extra_memory(server: Server, prompts: Prompts, repeats: int = 3) -> int:
    """Bytes that the first compression needs beyond the peak of prefill."""
    whole = {"vllm_xargs": {"mixeddim_budget": 1.0}}
    peaks = [peak_memory(server, prompts.next() | whole) for _ in range(repeats)]
    if compression_totals(server)[0] != 0:
        raise BenchmarkError(f"{server.spec.name} compressed a prompt of budget 1.0")
    return max(0, peak_memory(server, prompts.next()) - max(peaks))


def compare(
    servers: list[Server], prompts: Prompts, rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Time all servers in turns.

    Returns:
        Seconds to the first and second token by server, and compression seconds per prompt
        of the second server.
    """
    times: dict[str, list[tuple[float, float]]] = {server.spec.name: [] for server in servers}
    before = compression_totals(servers[1])
    for number in range(rounds):
        body = prompts.next()
        for place in range(len(servers)):
            server = servers[(number + place) % len(servers)]
            times[server.spec.name].append(token_seconds(server, body))
    after = compression_totals(servers[1])
    if after[0] - before[0] != rounds:
        raise BenchmarkError(f"{after[0] - before[0]} of {rounds} prompts were compressed")
    return times, (after[1] - before[1]) / rounds


def server_specs(arguments: argparse.Namespace) -> list[ServerSpec]:
    """Budget 1.0, --budget and stock, in this order."""
    tokens = CACHE_PROMPTS * (arguments.input_len + 256)
    size = tokens * cache_bytes_per_token(arguments.model, PRECISION[arguments.dtype])
    common = ("--dtype", arguments.dtype, "--kv-cache-memory-bytes", str(size))
    # One step per prompt, so that chunking differs in no server.
    length = str(arguments.input_len + 32)
    common += ("--max-model-len", length, "--max-num-batched-tokens", length)
    common += tuple(arguments.server_arg)
    budgets = dict.fromkeys((1.0, arguments.budget))
    ours = [
        ServerSpec(
            f"ours {budget:g}",
            common + our_flags(arguments.dtype, budget=budget, **arguments.mixeddim),
        )
        for budget in budgets
    ]
    return [*ours, ServerSpec("stock", common, STOCK_ONLY)]


def report(times: dict[str, list[tuple[float, float]]], tokens: int) -> str:
    """Medians and ratios to stock, of the first token and of the second."""
    medians = {name: median_seconds(pairs) for name, pairs in times.items()}
    rows = [
        [
            name,
            f"{first:.3f}",
            f"{tokens / first:.0f}",
            f"{first / medians['stock'][0]:.2f}x",
            f"{second:.3f}",
            f"{second / medians['stock'][1]:.2f}x",
        ]
        for name, (first, second) in medians.items()
    ]
    header = ["median of", "first token, s", "prompt tok/s", "to stock", "second, s", "to stock"]
    return table(header, rows)


def median_seconds(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Median seconds to the first and to the second token."""
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=list(PRECISION))
    parser.add_argument("--budget", type=float, default=0.25, help="below 1")
    parser.add_argument("--mixeddim", type=json.loads, default={}, help="more settings (JSON)")
    parser.add_argument("--input-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 512 tokens")
    parser.add_argument("--server-arg", action="append", default=[], help="flag of all servers")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    arguments = parser.parse_args()
    if not 0 < arguments.budget < 1:
        parser.error("--budget must lie between 0 and 1")
    if arguments.quick:
        arguments.input_len, arguments.rounds = 512, 3
    return arguments


def main() -> None:
    """Compare prefill."""
    arguments = parse_arguments()
    prepare()
    described = machine()
    print(json.dumps(described))
    folder = Path(tempfile.mkdtemp(prefix="mdkv-prefill-"))
    print(f"logs: {folder}", flush=True)
    prompts = Prompts(arguments.model, arguments.input_len)
    with contextlib.ExitStack() as stack:
        # One after the other: starting together they would compile against each other.
        servers = [
            stack.enter_context(serve(spec, arguments.model, folder, arguments.start_timeout))
            for spec in server_specs(arguments)
        ]
        extra = extra_memory(servers[1], prompts)
        compare(servers, prompts, 1)  # warms up
        times, seconds = compare(servers, prompts, arguments.rounds)
        flags = {server.spec.name: server.spec.flags for server in servers}
        threads = servers[0].threads
    share = seconds / median_seconds(times[servers[1].spec.name])[0]
    print(f"\n{arguments.rounds} prompts of {arguments.input_len} tokens, {arguments.dtype}")
    print(report(times, arguments.input_len))
    print(
        f"compression: {seconds:.3f} s per prompt, {share:.0%} of the time to first token, "
        f"{extra / 1e6:.1f} MB beyond the peak of prefill"
    )
    if arguments.out is not None:
        content = {
            "machine": described,
            "settings": {key: str(value) for key, value in vars(arguments).items()},
            "flags": flags,
            "worker_threads": threads,
            "token_seconds": times,
            "compression_s": seconds,
            "compression_share": share,
            "compression_extra_bytes": extra,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
