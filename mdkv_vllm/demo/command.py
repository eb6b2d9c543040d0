"""Find a server or start one, and show both parts of the demo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from mdkv_vllm.demo.answer import show_answer
from mdkv_vllm.demo.client import get_json, is_up
from mdkv_vllm.demo.question import show_question

START_TIMEOUT_SECONDS = 600


def run_demo(url: str | None, port: int, console: Console) -> int:
    """Ask with compression on, then off, and print both side by side.

    Args:
        url: a running server; None to use one on this machine's ``port``, or to start one.
        port: where to look for it, or to start it.
        console: where to print.

    Returns:
        0 if both answers name the planted fact, else 1.
    """
    if url is None and is_up(local := f"http://127.0.0.1:{port}"):
        url = local
    if url is not None:
        return _show(url.rstrip("/"), console)
    console.print("No server is running; starting one (about a minute)...")
    with _started_server() as started:
        return _show(started, console)


def _show(url: str, console: Console) -> int:
    model = get_json(f"{url}/v1/models")["data"][0]
    found = show_question(url, model["id"], console)
    show_answer(url, model["id"], model["max_model_len"], console)
    return 0 if found else 1


@contextmanager
def _started_server() -> Iterator[str]:
    """What `make serve` would start, on a free port; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parents[2] / "scripts" / "serve.sh"
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
        while not is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the server did not start; its log is {log}")
            time.sleep(1)
        yield url
    finally:
        # A server that did not start has no process group any more.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
