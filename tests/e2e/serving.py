"""Start, drive and stop a vLLM server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from mdkv_vllm.calibrate.command import reference_text

START_SECONDS = 600
NEEDLE = "The secret access code of the library is {}."
PRIMER = "The secret access code of the library is"


def fast_dtype():
    """The type that this machine computes fastest in, for tests that compare nothing exactly."""
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def vllm_command():
    return str(Path(sys.executable).parent / "vllm")


def environment():
    return {
        **os.environ,
        **own_core(),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "mixeddim",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_script(script, folder, job, **variables):
    """Run a script of this folder in a process of its own: what it makes of a job, JSON both."""
    result = folder / "result.json"
    done = subprocess.run(
        [
            sys.executable, str(Path(__file__).parent / script),
            json.dumps({**job, "result": str(result)}),
        ],
        env={**environment(), **variables}, capture_output=True, text=True, timeout=800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(result.read_text())


def own_core():
    """A core for the model's worker, where tests run in several processes.

    vLLM would bind the workers of all servers to the same one.
    """
    process = os.environ.get("PYTEST_XDIST_WORKER")
    if process is None:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    number = int(process.removeprefix("gw"))
    return {"VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)])}


class Server:
    """``vllm serve MODEL --attention-backend mixeddim`` on a free port of this machine."""

    def __init__(self, model, settings, *arguments, api_key=None, variables=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            vllm_command(), "serve", str(model), "--host=127.0.0.1", f"--port={port}",
            "--served-model-name=model", "--enforce-eager", "--attention-backend=mixeddim",
            "--additional-config", json.dumps({"mixeddim": settings}), *arguments,
        ]  # fmt: skip
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.command += ["--api-key", api_key]
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.environment = environment() | (variables or {})
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, env=self.environment,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.get("/health")
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise AssertionError(f"no server:\n{self.log_text()[-5000:]}") from None
                time.sleep(0.5)

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=120)

    def log_text(self):
        return Path(self.log.name).read_text()

    def get(self, path):
        request = urllib.request.Request(self.url + path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read().decode()

    def post(self, path, **body):
        """Status and JSON body."""
        return self.post_text(path, json.dumps({"model": "model", **body}))

    def post_text(self, path, text):
        """Status and JSON body."""
        request = urllib.request.Request(self.url + path, text.encode(), self.headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt, budget=None, max_tokens=16, **body):
        """The completion, as vLLM answers it."""
        extra = {"mixeddim_budget": budget} if budget else {}
        status, answer = self.post(
            "/v1/completions", prompt=prompt, max_tokens=max_tokens, vllm_xargs=extra,
            **{"temperature": 0, **body},
        )  # fmt: skip
        assert status == 200, answer
        return answer

    def text(self, prompt, budget=None, **body):
        return self.complete(prompt, budget, **body)["choices"][0]["text"]

    def metric(self, name):
        """Sum of a metric's samples."""
        lines = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.M)
        return sum(map(float, lines))

    def status(self):
        return json.loads(self.get("/mixeddim/status"))


def haystack(tokenizer, num_tokens, needle, depth, skip=20_000):
    """A chat prompt of about ``num_tokens`` tokens that hides a needle; token ids."""

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    head = encode("<|im_start|>user\n")
    tail = encode(
        "\nWhat is the secret access code of the library?<|im_end|>\n"
        f"<|im_start|>assistant\n{PRIMER}"
    )
    middle = encode(f"\n\n{NEEDLE.format(needle)}\n\n")
    filler = encode(reference_text()[skip : skip + 8 * num_tokens])
    filler = filler[: num_tokens - len(head) - len(tail) - len(middle)]
    at = int(depth * len(filler))
    assert len(head + filler + middle + tail) == num_tokens, "the text ends before the prompt does"
    return head + filler[:at] + middle + filler[at:] + tail
