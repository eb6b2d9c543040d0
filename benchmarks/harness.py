"""What the benchmarks of servers share: start, drive and stop `vllm serve`; name the machine.

Every server is a child in a process group of its own, so stopping it ends exactly what it
started. Every wait has an end.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
"""The `vllm` command of the running interpreter's environment."""
HOST = "127.0.0.1"
STOP_SECONDS = 30.0
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
STOCK_ONLY = {"VLLM_PLUGINS": "none"}
"""Environment in which vLLM loads no plugin at all, ours included."""

_STEP = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, "
    r"(\d+) generation requests, (\d+) generation tokens"
)
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$")
_THREADS = re.compile(r"core ids=\[([\d, ]*)\]")


class BenchmarkError(RuntimeError):
    """A server or a client did not do its part; the message says which and where its log is."""


@dataclass(frozen=True)
class Step:
    """One engine step, from the line vLLM logs under --enable-logging-iteration-details.

    Attributes:
        at: when the line was read, in seconds of ``time.monotonic``.
        prompt_tokens: tokens of requests that have no output yet.
        requests: other requests in the step; each yields one token, or none while its
            prompt is computed again after a preemption.
        tokens: tokens of those requests.
    """

    at: float
    prompt_tokens: int
    requests: int
    tokens: int

    @property
    def only_decodes(self) -> bool:
        """Whether no prompt token was processed, not even of a preempted request's prompt."""
        return self.prompt_tokens == 0 and 0 < self.requests == self.tokens


@dataclass(frozen=True)
class ServerSpec:
    """A server to start: its name in tables, flags after ``vllm serve MODEL``, environment."""

    name: str
    flags: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


class Server:
    """A running `vllm serve`; use :func:`serve`.

    Attributes:
        url: where it listens.
        pid: process id of its API server, and of its process group.
        steps: engine steps so far.
        threads: CPU cores that vLLM bound the worker to, None where it did not say.
    """

    def __init__(self, spec: ServerSpec, model: str, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.steps: list[Step] = []
        self.threads: int | None = None
        with socket.socket() as probe:  # a port that nobody listens on
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        environment = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_SERVER_DEV_MODE="1")
        # It overrides --kv-cache-memory-bytes, and knows whole GiB only.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        command = [*VLLM, "serve", model, "--host", HOST, "--port", str(port), *spec.flags]
        self._process = subprocess.Popen(
            [*command, "--enable-logging-iteration-details"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment | spec.environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self.log.open("w") as log:
            for line in self._process.stdout:
                now = time.monotonic()
                if match := _STEP.search(line):
                    _, prompt_tokens, requests, tokens = map(int, match.groups())
                    self.steps.append(Step(now, prompt_tokens, requests, tokens))
                elif match := _THREADS.search(line):
                    self.threads = len(match[1].split(","))
                log.write(line)
                log.flush()

    def wait_until_healthy(self, seconds: float) -> None:
        """Wait for /health.

        Raises:
            BenchmarkError: it ended, or did not answer in time.
        """
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if self._process.poll() is not None:
                raise BenchmarkError(f"server {self.spec.name} ended; its log is {self.log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise BenchmarkError(f"server {self.spec.name} not healthy in {seconds:.0f} s: {self.log}")

    def post(self, path: str, body: dict[str, Any], seconds: float = 300.0) -> dict[str, Any]:
        """Send JSON and return the JSON answer.

        Raises:
            BenchmarkError: the server refused it or did not answer.
        """
        with self._send(path, body, seconds) as answer:
            return json.load(answer)

    def stream(
        self, path: str, body: dict[str, Any], seconds: float = 300.0
    ) -> Iterator[dict[str, Any]]:
        """Send JSON and return the answer's events as they come.

        Raises:
            BenchmarkError: the server refused it or did not answer.
        """
        with self._send(path, body | {"stream": True}, seconds) as answer:
            for line in answer:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)

    @contextlib.contextmanager
    def _send(
        self, path: str, body: dict[str, Any], seconds: float
    ) -> Iterator[http.client.HTTPResponse]:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                yield answer
            return
        except urllib.error.HTTPError as error:
            reason = f"{error} {error.read()[:500]!r}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
        raise BenchmarkError(f"server {self.spec.name}, POST {path}: {reason}; log {self.log}")

    def metrics(self) -> dict[str, float]:
        """Values of /metrics, summed over labels."""
        totals: dict[str, float] = {}
        for name, _, value in self._samples():
            totals[name] = totals.get(name, 0.0) + value
        return totals

    def cache_info(self) -> dict[str, str]:
        """Labels of vllm:cache_config_info, such as block_size and num_gpu_blocks."""
        for name, labels, _ in self._samples():
            if name == "vllm:cache_config_info":
                return dict(re.findall(r'(\w+)="([^"]*)"', labels))
        return {}

    def _samples(self) -> Iterator[tuple[str, str, float]]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            if match := _SAMPLE.match(line):
                yield match[1], match[2] or "", float(match[3])

    def worker_pid(self) -> int:
        """The process that holds the model: the largest of the server's process group."""
        sizes = {}
        for entry in Path("/proc").iterdir():
            # A process may end while it is looked at.
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if os.getpgid(pid) == self.pid:
                    sizes[pid] = memory_of(pid)["VmRSS"]
        return max(sizes, key=lambda pid: sizes[pid])

    def stop(self) -> None:
        """Ask it to end, then end whatever is left of its process group."""
        end = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        # WNOWAIT leaves the dead leader in place, so the group's id cannot pass to strangers.
        with contextlib.suppress(ChildProcessError):  # it ended before, and was waited for
            while time.monotonic() < end and not os.waitid(
                os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)
        self._reader.join(STOP_SECONDS)


@contextlib.contextmanager
def serve(spec: ServerSpec, model: str, logs: Path, seconds: float) -> Iterator[Server]:
    """Start a server, wait until it is healthy, and stop it at the end."""
    server = Server(spec, model, logs / f"{spec.name.replace(' ', '-')}.log")
    try:
        server.wait_until_healthy(seconds)
        yield server
    finally:
        server.stop()


def our_flags(dtype: str, **settings: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Flags that select our backend, with a 16-bit cache whatever the compute dtype."""
    flags = ("--attention-backend", "mixeddim")
    flags += ("--additional-config", json.dumps({"mixeddim": settings}))
    # Stock's CPU backend takes this flag too, and then answers nonsense.
    return flags + (("--kv-cache-dtype", "bfloat16") if dtype == "float32" else ())


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of VmRSS and VmHWM of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def cache_bytes_per_token(model: str, itemsize: int) -> int:
    """Bytes that one token takes in a model's KV cache."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * heads * 2 * size * itemsize


def machine() -> dict[str, Any]:
    """What to know about this machine to read the numbers."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo, re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": fields.get("model name", platform.processor()),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "vllm", "mdkv-vllm")},
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def write_results(
    out: Path | None,
    described: dict[str, Any],
    arguments: argparse.Namespace,
    results: Sequence[Any],
) -> None:
    """Write a benchmark's results as JSON, with what they were measured on and by.

    Args:
        out: where to; None for nowhere.
        described: the machine.
        arguments: of the command line.
        results: dataclasses, one per server.
    """
    if out is None:
        return
    settings = {key: str(value) for key, value in vars(arguments).items()}
    content = {"machine": described, "settings": settings}
    content["results"] = [asdict(result) for result in results]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1))


def prepare() -> None:
    """Check the environment, and let SIGTERM run the ends of ``with`` blocks.

    Raises:
        SystemExit: the `vllm` command cannot run.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if _version("vllm") is None:
        sys.exit("no distribution named vllm is installed; run scripts/setup-cpu.sh")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    )
