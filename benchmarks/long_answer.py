"""One long answer: cache blocks in use and time per token while it grows, ours and stock.

    python benchmarks/long_answer.py --model MODEL --dtype bfloat16 --out results/long_answer.json

One server after the other, with the same bytes of KV memory, answers the same prompt of random
tokens greedily. Blocks are those of 16 tokens at full size that the bytes in use would hold.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import harness
from harness import STOCK_ONLY, ServerSpec
from serving import Sampler, warm_up

BLOCK_TOKENS = 16
SERVERS = ("ours", "stock")


@dataclass
class Result:
    """One server's run.

    Attributes:
        name: of the server.
        blocks: in use at each mark, of 16 tokens at full size.
        step_ms: median milliseconds per token between a mark and the one before it.
    """

    name: str
    blocks: list[float]
    step_ms: list[float]


def measure(spec: ServerSpec, arguments: argparse.Namespace, folder: Path) -> Result:
    """Start a server, drive it, and stop it."""
    prompt = random.Random(3).choices(range(300, 30_000), k=arguments.prompt)
    body = {
        "model": arguments.model, "prompt": prompt, "max_tokens": arguments.answer,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    with harness.serve(spec, arguments.model, folder, 600) as server:
        warm_up(server, arguments.model)
        cache, begun = server.cache_info(), len(server.steps)
        with Sampler(server) as sampler:
            server.post("/v1/completions", body, 3600)
        steps = [step for step in server.steps[begun:] if step.only_decodes]
    tokens = (int(cache["num_gpu_blocks"]) - 1) * int(cache["block_size"])
    result = Result(spec.name, [], [])
    part = arguments.answer // arguments.marks
    for mark in range(part, arguments.answer + 1, part):
        last = steps[min(mark, len(steps)) - 1].at
        usage = [one["cache_usage"] for one in sampler.samples if one["at"] <= last][-1]
        result.blocks.append(usage * tokens / BLOCK_TOKENS)
        times = [b.at - a.at for a, b in pairwise(steps[mark - part : mark])]
        result.step_ms.append(1e3 * median(times))
    return result


def report(results: list[Result], arguments: argparse.Namespace) -> str:
    """Blocks and times at every mark."""
    header = ["tokens"]
    for what in ("blocks", "ms a token"):
        header += [f"{what}, {result.name}" for result in results]
        header += ["ours/stock"] * (len(results) - 1)
    rows, part = [], arguments.answer // arguments.marks
    for at in range(arguments.marks):
        row = [str((at + 1) * part)]
        for numbers in ([r.blocks[at] for r in results], [r.step_ms[at] for r in results]):
            row += [f"{number:.1f}" for number in numbers]
            row += [f"{numbers[0] / number:.2f}x" for number in numbers[1:]]
        rows.append(row)
    return harness.table(header, rows)


def main() -> None:
    """Compare the servers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--mixeddim", type=json.loads, default={}, help="more settings (JSON)")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=7000)
    parser.add_argument("--marks", type=int, default=7, help="rows of the table")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    arguments = parser.parse_args()
    harness.prepare()
    longest = arguments.prompt + arguments.answer + BLOCK_TOKENS
    size = 2 * longest * harness.cache_bytes_per_token(arguments.model, 2)
    common = (
        "--dtype", arguments.dtype, "--max-model-len", str(longest),
        "--kv-cache-memory-bytes", str(size),
    )  # fmt: skip
    ours = harness.our_flags(arguments.dtype, budget=arguments.budget, **arguments.mixeddim)
    specs = {
        "ours": ServerSpec("ours", (*common, *ours)),
        "stock": ServerSpec("stock", common, STOCK_ONLY),
    }
    described = harness.machine()
    print(json.dumps(described))
    folder = Path(tempfile.mkdtemp(prefix="mdkv-long-answer-"))
    print(f"logs: {folder}", flush=True)
    results = []
    for name in arguments.servers:
        results.append(measure(specs[name], arguments, folder))
        print(f"\n{report(results, arguments)}", flush=True)
    harness.write_results(arguments.out, described, arguments, results)


if __name__ == "__main__":
    main()
