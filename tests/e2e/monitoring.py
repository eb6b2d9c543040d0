"""A real Prometheus that scrapes a real server and evaluates the chart's rules."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from programs import program

FILES = Path(__file__).parents[2] / "deploy" / "helm" / "mdkv-vllm" / "files"
RULES = FILES / "rules.yaml"
DASHBOARD = FILES / "dashboard.json"


class Prometheus:
    """Prometheus on a free port of this machine, with its data in a folder."""

    def __init__(self, folder, target):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.command = [
            program("prometheus", "scripts/setup-prometheus.sh"),
            f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        self.log = folder / "prometheus.log"

    def __enter__(self):
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise AssertionError(f"no Prometheus:\n{self.log.read_text()}") from None
                time.sleep(0.2)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=60)

    def get(self, path, **parameters):
        """The ``data`` of an answer of Prometheus' API; what it refuses fails the test."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def over_the_last(self, seconds, query):
        """Values of every series that a query gave at some time in the last seconds."""
        now = time.time()
        answer = self.get("query_range", query=query, start=now - seconds, end=now, step=1)
        return [
            [value for _, value in series["values"] if value != "NaN"]
            for series in answer["result"]
        ]  # fmt: skip
