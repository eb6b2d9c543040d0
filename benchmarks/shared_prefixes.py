"""Shared prefixes: documents asked about in rotation, and a chat of many turns; ours and stock.

    python benchmarks/shared_prefixes.py --model MODEL --dtype bfloat16 --out results/shared.json

One server after the other gets the same requests, one at a time, and the same bytes of KV memory:
what `--holds` documents take in a 16-bit cache, plus the one block that vLLM never gives away.

- Documents: each is asked about once, then all of them again in the same order, `--rounds` times;
  every question is another one. Measured from the second round on: prompt tokens that were
  computed, time to first token.
- Chat: `--turns` turns, each of which brings `--turn-tokens` tokens and gets an answer of 64.
  Measured from the second turn on, per turn: prompt tokens computed beyond the new ones.

Documents are random tokens: what is read from a cache does not depend on what it says.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import harness
from harness import STOCK_ONLY, Server, ServerSpec
from serving import STOCK_BLOCK_TOKENS, warm_up

ANSWER_TOKENS = 64
SERVERS = ("ours", "stock")


@dataclass
class Result:
    """One server's run.

    Attributes:
        name: of the server.
        kv_bytes: of its cache.
        computed: share of the documents' prompt tokens that was computed.
        first_token_s: mean seconds to the first token of a question about a document.
        chat_computed: per turn, prompt tokens computed beyond those that are new.
        chat_first_token_s: median seconds to the first token of a turn.
    """

    name: str
    kv_bytes: int
    computed: float
    first_token_s: float
    chat_computed: list[int]
    chat_first_token_s: float


def ask(server: Server, model: str, tokens: list[int], answer: int) -> tuple[float, int, list[int]]:
    """Send a prompt: seconds to the first token, prompt tokens computed, tokens of the answer."""
    before = hits(server)
    body = {
        "model": model, "prompt": tokens, "max_tokens": answer, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    started, first, given = time.perf_counter(), 0.0, list[int]()
    for event in server.stream("/v1/completions", body):
        first = first or time.perf_counter() - started
        given += event["choices"][0].get("token_ids") or []
    return first, len(tokens) - int(hits(server) - before), given


def hits(server: Server) -> float:
    """Prompt tokens that were found in the prefix cache so far."""
    return server.metrics()["vllm:prefix_cache_hits_total"]


def documents(server: Server, arguments: argparse.Namespace) -> tuple[float, float]:
    """Share of prompt tokens computed, and mean seconds to first token, after the first round."""
    choose = random.Random(1)
    texts = [_tokens(choose, arguments.document_tokens) for _ in range(arguments.documents)]
    seconds, computed, asked = [], 0, 0
    for turn in range(1 + arguments.rounds):
        for text in texts:
            prompt = text + _tokens(choose, arguments.question_tokens)
            first, new, _ = ask(server, arguments.model, prompt, 4)
            if turn:
                seconds.append(first)
                computed, asked = computed + new, asked + len(prompt)
    return computed / asked, mean(seconds)


def chat(server: Server, arguments: argparse.Namespace) -> tuple[list[int], float]:
    """Per turn from the second on: tokens computed beyond the new ones; median first token."""
    choose, tokens = random.Random(2), list[int]()
    beyond, seconds = [], []
    for turn in range(arguments.turns):
        new = _tokens(choose, arguments.turn_tokens)
        tokens += new
        first, computed, answer = ask(server, arguments.model, tokens, ANSWER_TOKENS)
        if turn:
            beyond.append(computed - len(new))
            seconds.append(first)
        tokens += answer
    return beyond, median(seconds)


def _tokens(choose: random.Random, count: int) -> list[int]:
    return choose.choices(range(300, 30_000), k=count)


def measure(spec: ServerSpec, size: int, arguments: argparse.Namespace, folder: Path) -> Result:
    """Start a server, drive it, and stop it."""
    with harness.serve(spec, arguments.model, folder, 600) as server:
        warm_up(server, arguments.model)
        computed, first = documents(server, arguments)
        beyond, chat_first = chat(server, arguments)
    return Result(spec.name, size, computed, first, beyond, chat_first)


def report(results: list[Result]) -> str:
    """A table of all servers, and our ratios to stock."""
    rows = []
    for title, numbers, digits in (
        ("documents: share computed", [r.computed for r in results], 3),
        ("documents: first token, s", [r.first_token_s for r in results], 3),
        ("chat: computed beyond the new, mean", [mean(r.chat_computed) for r in results], 0),
        ("chat: computed beyond the new, most", [max(r.chat_computed) for r in results], 0),
        ("chat: first token, s", [r.chat_first_token_s for r in results], 3),
    ):
        ratios = [f"{numbers[0] / n:.2f}x" if n else "-" for n in numbers[1:]]
        rows.append([title, *(f"{n:.{digits}f}" for n in numbers), *ratios])
    names = [result.name for result in results]
    return harness.table(["", *names, *(f"ours/{name}" for name in names[1:])], rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument(
        "--mixeddim", type=json.loads, default={"segments": "rolling"}, help="more settings (JSON)"
    )
    for name, default in (
        ("documents", 40), ("document-tokens", 2048), ("question-tokens", 40), ("holds", 12),
        ("rounds", 2), ("turns", 10), ("turn-tokens", 350),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    return parser.parse_args()


def main() -> None:
    """Compare the servers."""
    arguments = parse_arguments()
    harness.prepare()
    blocks = arguments.holds * -(-arguments.document_tokens // STOCK_BLOCK_TOKENS) + 1
    size = blocks * STOCK_BLOCK_TOKENS * harness.cache_bytes_per_token(arguments.model, 2)
    longest = max(
        arguments.document_tokens + arguments.question_tokens,
        arguments.turns * (arguments.turn_tokens + ANSWER_TOKENS),
    )
    common = (
        "--dtype", arguments.dtype, "--max-model-len", str(longest + 16),
        "--kv-cache-memory-bytes", str(size),
    )  # fmt: skip
    ours = harness.our_flags(arguments.dtype, budget=arguments.budget, **arguments.mixeddim)
    flags: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "ours": (ours, {}), "stock": ((), STOCK_ONLY),
    }  # fmt: skip
    described: dict[str, Any] = harness.machine()
    print(json.dumps(described))
    folder = Path(tempfile.mkdtemp(prefix="mdkv-shared-"))
    print(f"logs: {folder}", flush=True)
    results: list[Result] = []
    for name in arguments.servers:
        more, environment = flags[name]
        spec = ServerSpec(name, (*common, *more), environment)
        results.append(measure(spec, size, arguments, folder))
        print(f"\n{report(results)}", flush=True)
    harness.write_results(arguments.out, described, arguments, results)


if __name__ == "__main__":
    main()
