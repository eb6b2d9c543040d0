"""One question about a long document, with compression and without."""

from __future__ import annotations

import os
import pydoc_data.topics
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from mdkv_vllm.demo.client import BlockMeter, report_of, stream

FACT = "The secret access code of the library is 7391842."
QUESTION = "What is the secret access code of the library?"
ANSWER = "7391842"
PRIMER = "The secret access code of the library is"
DOCUMENT_WORDS = 1400
ANSWER_TOKENS = 160


def document() -> str:
    """About 1,800 tokens of Python's language reference with one planted fact in its midst."""
    topics = pydoc_data.topics.topics
    words = " ".join(topics[name] for name in ("class", "naming", "types")).split()[:DOCUMENT_WORDS]
    middle = len(words) // 2
    return " ".join([*words[:middle], f"\n\n{FACT}\n\n", *words[middle:]])


@dataclass
class Run:
    """What one request showed.

    Attributes:
        answer: generated text.
        first_token_seconds: until the first token.
        decode_tokens_per_second: between the first token and the last.
        blocks_in_use: cache blocks in use on the server late in the answer, which holds about
            ten blocks itself.
        usage: token counts from the server.
        report: the server's own report of the compression, empty where there was none.
    """

    answer: str = ""
    first_token_seconds: float = 0.0
    decode_tokens_per_second: float = 0.0
    blocks_in_use: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def show_question(url: str, model: str, console: Console) -> bool:
    """Ask with compression on, then off, and print both side by side.

    Args:
        url: the server.
        model: model name.
        console: where to print.

    Returns:
        Whether both answers name the planted fact.
    """
    console.print(
        f"[bold]{QUESTION}[/bold]  ({model} at {url}; the document has the answer inside)"
    )
    # A budget of 1.0 first would leave the whole prompt in the prefix cache for the other.
    runs = {}
    for name, extra in (("compressed", {}), ("compression off", {"mixeddim_budget": 1.0})):
        console.print(f"\n[cyan]{name}:[/cyan] {PRIMER}", end="")
        runs[name] = ask(url, model, extra, console)
        console.print()
    console.print(comparison_table(runs))
    return all(ANSWER in run.answer for run in runs.values())


def ask(url: str, model: str, extra: dict[str, Any], console: Console) -> Run:
    """Stream one answer and measure the server while it does.

    Args:
        url: the server.
        model: model name.
        extra: ``vllm_xargs``.
        console: where the answer is printed as it comes.
    """
    question = f"{document()}\n{QUESTION}"
    # The salt keeps runs apart in the prefix cache, so that both prefill the whole prompt.
    body = {
        "model": model,
        "prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{PRIMER}",
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
        "cache_salt": os.urandom(8).hex(),
        "vllm_xargs": extra,
    }
    run, request_id = Run(), ""
    with BlockMeter(url) as meter:
        started = time.perf_counter()
        first = second = 0.0
        for event in stream(f"{url}/v1/completions", body):
            request_id = event["id"]
            run.usage = event.get("usage") or run.usage
            for choice in event["choices"]:
                second = second or (time.perf_counter() if first else 0.0)
                first = first or time.perf_counter()
                run.answer += choice["text"]
                if len(run.answer) < 120:
                    console.print(choice["text"].replace("\n", " "), end="", highlight=False)
        ended = time.perf_counter()
    run.first_token_seconds = first - started
    # Compression runs before the second token and has a line of its own.
    run.decode_tokens_per_second = (run.usage["completion_tokens"] - 2) / (ended - second)
    run.blocks_in_use = meter.last_between(first, ended - 0.2)
    run.report = report_of(url, request_id, "prompt")
    return run


def comparison_table(runs: dict[str, Run]) -> Table:
    """The runs side by side."""
    table = Table(title="one request, measured on the server")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    rows: dict[str, list[str]] = {
        "answer found": ["yes" if ANSWER in run.answer else "no" for run in runs.values()],
        "prompt tokens": [str(run.usage["prompt_tokens"]) for run in runs.values()],
        "prompt blocks before compression": [
            str(run.report.get("full_blocks", "-")) for run in runs.values()
        ],
        "prompt blocks after compression": [
            str(run.report.get("kept_blocks", "-")) for run in runs.values()
        ],
        "blocks in use while answering": [str(run.blocks_in_use) for run in runs.values()],
        "prompt bytes kept": [
            f"{run.report['kept_share']:.1%}" if run.report else "-" for run in runs.values()
        ],
        "time to first token": [f"{run.first_token_seconds:.2f} s" for run in runs.values()],
        "compression, before the second token": [
            f"{run.report['seconds']:.2f} s" if run.report else "-" for run in runs.values()
        ],
        "decode tokens per second": [
            f"{run.decode_tokens_per_second:.1f}" for run in runs.values()
        ],
    }
    for format_name in next(iter(runs.values())).report.get("tokens", {}):
        counts = [run.report.get("tokens", {}) for run in runs.values()]
        rows[f"tokens x layers x heads as {format_name}"] = [
            f"{count[format_name]:,}" if count else "-" for count in counts
        ]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table
