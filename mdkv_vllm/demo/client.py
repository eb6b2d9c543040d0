"""What the demo asks a server."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

SAMPLE_SECONDS = 0.05


class BlockMeter:
    """Samples the server's cache usage from ``/metrics`` while a request runs.

    Attributes:
        samples: moments of ``time.perf_counter``, and cache blocks in use at each.
    """

    def __init__(self, url: str) -> None:
        self.samples: list[tuple[float, int]] = []
        self._url = url
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> BlockMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def last_between(self, start: float, end: float) -> int:
        """Blocks in use in the last sample between two moments, 0 where there is none."""
        return next((b for at, b in reversed(self.samples) if start < at <= end), 0)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.samples.append((time.perf_counter(), blocks_in_use(self._url)))


def blocks_in_use(url: str) -> int:
    """Cache blocks in use now, from the server's metrics."""
    share, total = 0.0, 0
    for line in open_url(f"{url}/metrics").decode().splitlines():
        if line.startswith("vllm:kv_cache_usage_perc"):
            share = float(line.rsplit(" ", 1)[1])
        elif line.startswith("vllm:cache_config_info"):
            total = int(line.split('num_gpu_blocks="', 1)[1].split('"', 1)[0])
    # One block is vLLM's null block, which is never lent.
    return round(share * (total - 1))


def report_of(url: str, request_id: str, part: str) -> dict[str, Any]:
    """The server's last report of compressing a segment of a request; empty where there is none.

    Args:
        url: the server.
        request_id: what its answer was sent under.
        part: ``prompt`` or ``answer``.
    """
    try:
        recent = get_json(f"{url}/mixeddim/status")["recent"]
    except urllib.error.HTTPError:
        return {}
    of_part = (r for r in reversed(recent) if r["part"] == part)
    return next((r for r in of_part if r["request_id"].startswith(request_id)), {})


def is_up(url: str) -> bool:
    """Whether a server answers."""
    try:
        open_url(f"{url}/health")
    except OSError:
        return False
    return True


def open_url(url: str) -> bytes:
    """What a URL answers.

    Raises:
        OSError: nothing, or an error.
    """
    with urllib.request.urlopen(url, timeout=30) as reply:
        return bytes(reply.read())


def get_json(url: str) -> Any:  # noqa: ANN401
    """JSON that a URL answers."""
    return json.loads(open_url(url))


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Events of a streamed completion.

    Raises:
        ValueError: the server refuses the request; the message is its own.
    """
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        reply = urllib.request.urlopen(request, timeout=600)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}: {error.read().decode()}") from error
    with reply:
        for line in reply:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
