"""``mdkv demo``: one question about a long document, with compression on and off."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FACT = "The secret access code of the library is 7391842."
QUESTION = "What is the secret access code of the library?"
ANSWER = "7391842"
PRIMER = "The secret access code of the library is"
DOCUMENT_WORDS = 1400
ANSWER_TOKENS = 160
START_TIMEOUT_SECONDS = 600


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


class BlockMeter:
    """Samples the server's cache usage from ``/metrics`` while a request runs."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._samples: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> BlockMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def last_between(self, start: float, end: float) -> int:
        """Blocks in use in the last sample between two moments."""
        return next((b for at, b in reversed(self._samples) if start < at <= end), 0)

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            self._samples.append((time.perf_counter(), blocks_in_use(self._url)))


def run_demo(url: str | None, port: int, console: Console) -> int:
    """Ask with compression on, then off, and print both side by side.

    Args:
        url: a running server; None to use one on this machine's ``port``, or to start one.
        port: where to look for it, or to start it.
        console: where to print.

    Returns:
        0 if both answers name the planted fact, else 1.
    """
    if url is None and _answers(local := f"http://127.0.0.1:{port}"):
        url = local
    if url is not None:
        return _compare(url.rstrip("/"), console)
    console.print("No server is running; starting one (about a minute)...")
    with _started_server() as started:
        return _compare(started, console)


def _compare(url: str, console: Console) -> int:
    model = _get(f"{url}/v1/models")["data"][0]["id"]
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
    return 0 if all(ANSWER in run.answer for run in runs.values()) else 1


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
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": os.urandom(8).hex(),
        "vllm_xargs": extra,
    }
    run, request_id = Run(), ""
    with BlockMeter(url) as meter:
        started = time.perf_counter()
        first = second = 0.0
        for event in _stream(f"{url}/v1/completions", body):
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
    run.report = _report_of(url, request_id)
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


def blocks_in_use(url: str) -> int:
    """Cache blocks in use now, from the server's metrics."""
    share, total = 0.0, 0
    for line in _open(f"{url}/metrics").decode().splitlines():
        if line.startswith("vllm:kv_cache_usage_perc"):
            share = float(line.rsplit(" ", 1)[1])
        elif line.startswith("vllm:cache_config_info"):
            total = int(line.split('num_gpu_blocks="', 1)[1].split('"', 1)[0])
    # One block is vLLM's null block, which is never lent.
    return round(share * (total - 1))


def _report_of(url: str, request_id: str) -> dict[str, Any]:
    try:
        recent = _get(f"{url}/mixeddim/status")["recent"]
    except urllib.error.HTTPError:
        return {}
    of_prompts = (r for r in reversed(recent) if r["part"] == "prompt")
    return next((r for r in of_prompts if r["request_id"].startswith(request_id)), {})


@contextmanager
def _started_server() -> Iterator[str]:
    """What `make serve` would start, on a free port; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent.parent / "scripts" / "serve.sh"
    log = Path(sys.prefix) / "demo-server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(script)],
            env={**os.environ, "PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the server did not start; its log is {log}")
            time.sleep(1)
        yield url
    finally:
        # A server that did not start has no process group any more.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        _open(f"{url}/health")
    except OSError:
        return False
    return True


def _open(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return bytes(reply.read())


def _get(url: str) -> Any:  # noqa: ANN401
    return json.loads(_open(url))


def _stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Events of a streamed completion.

    Raises:
        ValueError: the server refuses the request; the message is its own.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        reply = urllib.request.urlopen(request, timeout=600)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}: {error.read().decode()}") from error
    with reply:
        for line in reply:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
