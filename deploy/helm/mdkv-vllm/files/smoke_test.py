"""What `helm test` runs in the cluster: model list, one completion, our metrics.

Environment: BASE_URL of the server, MODEL as clients name it, API_KEY where it wants one. Needs
nothing but Python; ends with status 1 and one line that says what is wrong.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

METRICS = ("mixeddim:kept_bytes", "mixeddim:full_bytes", "vllm:num_requests_waiting")


def ask(path: str, body: dict[str, Any] | None = None, key: str = "") -> str:
    """The server's answer as text.

    Raises:
        OSError: no connection, or a status that is an error (urllib.error.HTTPError).
    """
    request = urllib.request.Request(os.environ["BASE_URL"] + path)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.read().decode()


def check() -> str:
    """Ask the server; what it answered, in one line.

    Raises:
        ValueError: an answer is not what a working server gives.
        OSError: see :func:`ask`.
    """
    model, key = os.environ["MODEL"], os.environ.get("API_KEY", "")
    models = [entry["id"] for entry in json.loads(ask("/v1/models", key=key))["data"]]
    if model not in models:
        raise ValueError(f"the server lists {models}, not {model}")
    if key:
        try:
            ask("/v1/models")
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
        else:
            raise ValueError("the server answers without an API key")
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8}
    text = json.loads(ask("/v1/completions", body, key))["choices"][0]["text"]
    if not text:
        raise ValueError("the completion is empty")
    metrics = ask("/metrics")
    missing = [name for name in METRICS if f"\n{name}{{" not in metrics]
    if missing:
        raise ValueError(f"/metrics lacks {', '.join(missing)}")
    return f"{model} answered {text!r}"


if __name__ == "__main__":
    try:
        print(check())
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"smoke test: {error}")
