"""What operators see of a running server: metrics, Prometheus, dashboard, status, mdkv top."""

import gzip
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from monitoring import DASHBOARD, RULES, Prometheus
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import Server

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.operate.model_sizes import read_model_sizes
from mdkv_vllm.operate.plan import Load, capacity, policy_for
from mdkv_vllm.operate.scrape import ServerAddress
from mdkv_vllm.plugin.metrics.table import METRICS

pytestmark = pytest.mark.server

LONG, SHORT, ANSWER = 1500, 40, 24


def prompt(tokens, seed):
    """Random tokens: no two prompts share a prefix."""
    choose = random.Random(seed)
    return [choose.randrange(300, 30_000) for _ in range(tokens)]


def send(server, lengths, **body):
    """Answer prompts of these lengths at the same time."""
    seeds = [random.randrange(1 << 30) for _ in lengths]
    threads = [
        threading.Thread(
            target=server.complete, args=(prompt(tokens, seed),),
            kwargs={"max_tokens": ANSWER, "ignore_eos": True, **body},
        )
        for tokens, seed in zip(lengths, seeds, strict=True)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    return threads


def finish(threads):
    for thread in threads:
        thread.join()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def counts(server):
    scrape = ServerAddress(server.url).scrape()
    return {
        "compressed": scrape.total("mixeddim:prompts_compressed_total"),
        "timed": scrape.total("mixeddim:compression_seconds_count"),
        "decided": scrape.total("mixeddim:prompt_budget_count"),
        "blocks": scrape.total("mixeddim:blocks_returned_total"),
        "tokens": scrape.total("mixeddim:compressed_tokens_total"),
        "too short": scrape.total("mixeddim:prompts_skipped_total", reason="too_short"),
    }


def test_every_metric_is_there_and_no_other(server):
    families = set(re.findall(r"^# TYPE (mixeddim:\S+)", server.get("/metrics"), re.M))
    assert families == {metric.exposed_name for metric in METRICS}


def test_counts_are_exact_and_what_is_held_goes_with_the_requests(server):
    before = counts(server)
    threads = send(server, [LONG, LONG, SHORT], max_tokens=64)
    address = ServerAddress(server.url)
    seen = []
    while any(thread.is_alive() for thread in threads):
        scrape = address.scrape()
        names = ("full_bytes", "kept_bytes", "lease_bytes", "lease_used_bytes")
        seen.append([scrape.total(f"mixeddim:{name}") for name in names])
        time.sleep(0.05)
    finish(threads)
    full, kept, leased, used = map(max, zip(*seen, strict=True))
    # Two prompts of 94 blocks, of 90 pages of 4,096 bytes each.
    assert full >= 2 * 94 * 90 * 4096
    assert all(row[1] <= row[0] for row in seen)
    assert min(row[1] / row[0] for row in seen if row[0] >= 2 * 94 * 90 * 4096) < 0.45
    assert 0 < kept < full
    assert 0.8 * leased < used <= leased
    wait_until(lambda: address.scrape().total("mixeddim:full_bytes") == 0)
    scrape = address.scrape()
    assert [scrape.total(f"mixeddim:{name}") for name in names] == [0, 0, 0, 0]
    assert server.status()["requests"] == []

    report = server.status()["recent"][-1]
    added = {name: after - before[name] for name, after in counts(server).items()}
    assert added == {
        "compressed": 2,
        "timed": 2,
        "decided": 3,
        "blocks": 2 * (report["full_blocks"] - report["kept_blocks"]),
        "tokens": 2 * sum(report["tokens"].values()),
        "too short": 0,  # part of its answer's first segment
    }


def test_an_aborted_request_holds_nothing(server):
    body = {"model": "model", "prompt": prompt(LONG, 1), "max_tokens": 500, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), server.headers
    )
    address = ServerAddress(server.url)
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.readline()
        wait_until(lambda: address.scrape().total("mixeddim:lease_bytes") > 0)
    for name in ("full_bytes", "kept_bytes", "lease_bytes", "lease_used_bytes"):
        wait_until(lambda name=name: address.scrape().total(f"mixeddim:{name}") == 0)


def test_status_has_configuration_totals_and_requests(server):
    threads = send(server, [LONG], max_tokens=200)
    wait_until(lambda: server.status()["requests"])
    (request,) = server.status()["requests"]
    finish(threads)
    assert request["prompt_tokens"] == LONG
    assert request["planned_share"] == pytest.approx(0.3, abs=0.02)
    assert set(request) == {
        "request_id", "prompt_tokens", "planned_share", "computed_tokens", "compressed_segments"
    }  # fmt: skip
    status = server.status()
    assert status["configuration"]["budget"] == "0.3"
    assert status["kernels"] == {"decode": "cpu", "prefill": "vLLM's CPU kernel"}
    assert status["configuration"]["heads"].startswith("mixeddim_heads.safetensors@")
    assert status["totals"]["prompts"] > 0


def test_top_shows_the_server(server):
    threads = send(server, [LONG, LONG], max_tokens=300)
    wait_until(lambda: server.metric("mixeddim:lease_bytes") > 0)
    # Longer than a step takes, which on a busy machine holds part of a prompt.
    command = [
        str(Path(sys.executable).parent / "mdkv"), "top", "--once", "--interval=5", "--url",
        server.url,
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    finish(threads)
    assert "budget 0.3" in shown
    assert re.search(r"[1-9]\d* running, 0 waiting", shown)
    assert re.search(r"[1-9][\d.]* generated", shown)
    assert re.search(r"as i4 +█+", shown)
    assert "1,500" in shown


def test_plan_agrees_with_the_server(server, model_folder):
    """The same blocks in the cache, and the same blocks kept of a prompt."""
    finish(send(server, [LONG]))
    report = server.status()["recent"][-1]
    sizes = read_model_sizes(str(model_folder))
    policy = policy_for(sizes, MixedDimConfig(budget=0.3), 16, torch.bfloat16, 1, True)
    plan = capacity(policy, 1 << 30, Load(LONG, 0))
    assert plan.prefill_blocks == report["full_blocks"]
    assert plan.kept_blocks == report["kept_blocks"]
    lent = int(server.get("/metrics").split('num_gpu_blocks="', 1)[1].split('"', 1)[0]) - 1
    assert plan.blocks == lent


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """Has watched the server compress prompts, leave one alone and idle."""
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(folder, server.url.removeprefix("http://")) as running:
        wait_until(lambda: running.over_the_last(30, "up"))
        for _ in range(3):
            finish(send(server, [LONG, LONG, SHORT]))
            time.sleep(1)
        time.sleep(2)
        yield running


def panels():
    return [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", [])
    ]


@pytest.mark.parametrize("query", panels())
def test_every_panel_has_data(prometheus, query):
    for variable, text in {"$model": ".*", "$instance": ".*", "$__rate_interval": "20s"}.items():
        query = query.replace(variable, text)
    assert "$" not in query
    assert any(prometheus.over_the_last(60, query)), query


def test_every_rule_is_evaluated_and_every_record_has_data(prometheus):
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    written = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    assert len(rules) == len(written) > 0
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    for rule in rules:
        if rule["type"] == "recording":
            assert any(prometheus.over_the_last(60, rule["name"])), rule["name"]
        else:
            assert rule["state"] == "inactive", rule


@pytest.mark.parametrize(
    "rule", yaml.safe_load(RULES.read_text())["groups"][1]["rules"], ids=lambda rule: rule["alert"]
)
def test_what_an_alert_compares_has_data(prometheus, rule):
    """Without its threshold, for a typing error in a name would keep an alert silent for ever."""
    measured = re.split(r"\s[<>]\s(?=0\.\d+)", rule["expr"])[0]
    assert any(prometheus.over_the_last(60, measured)), measured


@pytest.fixture
def collector():
    """An OpenTelemetry collector over HTTP: its address, and the spans that it got."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1/traces", spans
        http.shutdown()


def test_two_engines_on_one_machine(divisible_model):
    """Each schedules and compresses by itself; whichever server answers has the numbers of both."""
    with Server(
        divisible_model, {"budget": 0.4}, "--data-parallel-size=2", "--max-model-len=2048",
        variables={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_SERVER_DEV_MODE": "1"},
    ) as server:  # fmt: skip
        finish(send(server, [700] * 6, max_tokens=24))
        scrape = ServerAddress(server.url).scrape()
        done = [
            scrape.total("mixeddim:prompts_compressed_total", engine=engine)
            for engine in ("0", "1")
        ]
        assert sum(done) == 6
        assert min(done) > 0
        for name in ("full_bytes", "kept_bytes", "lease_bytes"):
            wait_until(lambda name=name: server.metric(f"mixeddim:{name}") == 0)
        assert server.metric("mixeddim:config_info") == 2
        assert server.post("/reset_prefix_cache") == (200, {"success": True})


def test_two_ranks_behind_two_api_servers(divisible_model, collector):
    """Exact from whichever process answers; counted once, not per rank; the key is asked for."""
    traces, spans = collector
    with Server(
        divisible_model, {"budget": 0.4}, "--api-server-count=2", "--tensor-parallel-size=2",
        "--max-model-len=2048", f"--otlp-traces-endpoint={traces}", api_key="secret",
        variables={
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            # With several API servers vLLM starts its workers before it sets this itself.
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces,
        },
    ) as server:  # fmt: skip
        finish(send(server, [700, 700, SHORT], max_tokens=8))
        wait_until(lambda: server.metric("mixeddim:full_bytes") == 0)
        report = server.status()["recent"][-1]
        returned = report["full_blocks"] - report["kept_blocks"]
        # Each rank reports its own head of three layers.
        span = sum(report["tokens"].values()) // 3
        for _ in range(10):
            added = counts(server)
            assert added == {
                "compressed": 2, "timed": 2, "decided": 3, "blocks": 2 * returned,
                "tokens": 2 * span * 3 * 2, "too short": 0,
            }  # fmt: skip
            for name in ("kept_bytes", "lease_bytes", "lease_used_bytes"):
                assert server.metric(f"mixeddim:{name}") == 0
            assert server.metric("mixeddim:config_info") == 1
        for key in (None, "wrong"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            request = urllib.request.Request(f"{server.url}/mixeddim/status", headers=headers)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=30)
        compressions = [r["request_id"] for r in server.status()["recent"]]
        wait_until(lambda: sum(span.name == "mixeddim.compress" for span in spans) == 2)
    ours = [span for span in spans if span.name == "mixeddim.compress"]
    attributes = [{a.key: a.value for a in span.attributes} for span in ours]
    assert [a["gen_ai.request.id"].string_value for a in attributes] == compressions
    assert [a["mixeddim.prompt_tokens"].int_value for a in attributes] == [700, 700]
