"""Numbers recorded in several processes, as prometheus_client's own collector adds them up."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

pytest.importorskip("vllm")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.plugin.metrics.configuration import configuration
from mdkv_vllm.plugin.metrics.recorder import Recorder
from mdkv_vllm.plugin.metrics.table import (
    COMPRESSED_TOKENS,
    COMPRESSION_SECONDS,
    CONFIG_INFO,
    LEASE_BYTES,
    LEASE_USED_BYTES,
    METRICS,
)
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.worker_runtime.reports import CompressionReport
from mdkv_vllm.policy import Policy

LABELS = {"model_name": "m", "engine": "0"}
POLICY = Policy(MixedDimConfig(), PageGeometry(16, 64, torch.bfloat16), 2, 2)
REPORT = CompressionReport(
    "r1",
    320,
    "prompt",
    0,
    304,
    20,
    5,
    3,
    0.25,
    {"drop": 500, "i4": 400, "i8": 200, "full": 100},
    0.02,
)


def worker(folder=None, rank=0, ranks=1, kv_heads=2, tracing=False, labels=LABELS, stage=0):
    recorder = Recorder(folder, labels, ranks, rank, tracing, stage)
    return recorder, WorkerMetrics(POLICY, configuration(POLICY, "/nowhere"), kv_heads, recorder)


def in_another_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def served(folder):
    """Values by sample name and labels, as ``/metrics`` would have them."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def value(folder, name, **labels):
    return served(folder).get((name, *sorted((LABELS | labels).items())))


def record_one(folder, rank, ranks, kv_heads, labels=LABELS, stage=0):
    one = worker(folder, rank, ranks, kv_heads, labels=labels, stage=stage)[1]
    one.record_compression(REPORT)


@pytest.mark.parametrize("second", [(1, 2, 4, LABELS), (0, 2, 4, LABELS, 1)], ids=["rank", "stage"])
def test_workers_add_up_heads_and_bytes_but_not_seconds(tmp_path, second):
    record_one(tmp_path, 0, 2, 4)
    in_another_process(record_one, tmp_path, *second)
    assert value(tmp_path, "mixeddim:compressed_tokens_total", format="i4", part="prompt") == 800
    assert value(tmp_path, "mixeddim:lease_bytes") == 2 * 3 * 4 * POLICY.geometry.page_bytes
    assert value(tmp_path, "mixeddim:compression_seconds_count") == 1
    infos = [v for k, v in served(tmp_path).items() if k[0] == "mixeddim:config_info"]
    assert infos == [1]


def test_a_rank_that_holds_copies_counts_nothing(tmp_path):
    """Four ranks, two KV heads: ranks 1 and 3 hold copies."""
    for rank in range(4):
        in_another_process(record_one, tmp_path, rank, 4, 2)
    assert value(tmp_path, "mixeddim:compressed_tokens_total", format="full", part="prompt") == 200


def test_engines_are_told_apart(tmp_path):
    record_one(tmp_path, 0, 1, 2)
    in_another_process(record_one, tmp_path, 0, 1, 2, LABELS | {"engine": "1"})
    for engine in "01":
        name = "mixeddim:compressed_tokens_total"
        assert value(tmp_path, name, engine=engine, format="i8", part="prompt") == 200


def test_a_dead_process_leaves_its_counts_and_not_its_leases(tmp_path):
    in_another_process(record_one, tmp_path, 0, 1, 2)
    assert value(tmp_path, "mixeddim:lease_bytes") > 0
    worker(tmp_path)
    assert value(tmp_path, "mixeddim:lease_bytes") == 0
    assert value(tmp_path, "mixeddim:compressed_tokens_total", format="full", part="prompt") == 100


def test_histograms_are_cumulative_and_start_at_zero(tmp_path):
    recorder, _ = worker(tmp_path)
    assert value(tmp_path, "mixeddim:compression_seconds_bucket", le="+Inf") == 0
    for seconds in (0.0005, 0.01, 0.02, 99):
        recorder.observe(COMPRESSION_SECONDS, seconds)
    name = "mixeddim:compression_seconds_bucket"
    expected = {"0.001": 1, "0.005": 1, "0.01": 2, "0.025": 3, "30.0": 3, "+Inf": 4}
    assert {le: value(tmp_path, name, le=le) for le in expected} == expected
    assert value(tmp_path, "mixeddim:compression_seconds_sum") == pytest.approx(99.0305)


def test_leases_are_gone_with_their_requests():
    recorder, metrics = worker()
    metrics.record_compression(REPORT)
    metrics.record_compression(replace(REPORT, request_id="r2"))
    metrics.record_compression(replace(REPORT, part="answer"))
    one = 3 * 4 * POLICY.geometry.page_bytes
    assert recorder.value(LEASE_BYTES) == 3 * one
    assert recorder.value(COMPRESSED_TOKENS, format="i4", part="answer") == 400
    metrics.released({"r1", "never seen"})
    assert recorder.value(LEASE_BYTES) == one
    metrics.released({"r2"})
    assert recorder.value(LEASE_BYTES) == recorder.value(LEASE_USED_BYTES) == 0


def test_numbers_may_come_after_the_request_has_gone():
    recorder, metrics = worker()
    metrics.record_compression(REPORT, resident=False)
    assert recorder.value(COMPRESSED_TOKENS, format="full", part="prompt") == 100
    assert recorder.value(LEASE_BYTES) == 0


def test_used_bytes_are_those_of_table_and_tokens():
    recorder, metrics = worker()
    metrics.record_compression(REPORT)
    tokens = 400 * (64 + 4) + 200 * (128 + 4) + 100 * 256
    table = 2 * 2 * 3 * 8
    assert recorder.value(LEASE_USED_BYTES) == table + tokens


def test_the_configuration_is_in_labels(tmp_path):
    basis = tmp_path / "mixeddim_basis.safetensors"
    basis.write_bytes(b"any")
    config = MixedDimConfig(budget=1, formats="paper", heads="even")
    labels = configuration(replace(POLICY, config=config), str(tmp_path))
    assert set(labels) == set(CONFIG_INFO.labels)
    assert labels["basis"].startswith("mixeddim_basis.safetensors@")
    assert (labels["compression"], labels["heads"], labels["budget"]) == ("off", "even", "1")
    by_tokens = configuration(replace(POLICY, config=MixedDimConfig(budget_tokens=800)), "/nowhere")
    assert (by_tokens["budget"], by_tokens["compression"]) == ("800 tokens", "on")
    off = configuration(replace(POLICY, config=MixedDimConfig(enabled=False)), "/nowhere")
    assert off["compression"] == "off"


def test_names_follow_the_convention():
    assert all(metric.name.startswith("mixeddim:") for metric in METRICS)
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(bool(metric.buckets) == (metric.kind == "histogram") for metric in METRICS)


def test_a_compression_is_a_span_where_tracing_is_on():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    worker()[1].record_compression(REPORT)
    assert exporter.get_finished_spans() == ()
    worker(tracing=True)[1].record_compression(REPORT)
    (span,) = exporter.get_finished_spans()
    assert span.name == "mixeddim.compress"
    assert span.end_time - span.start_time == int(REPORT.seconds * 1e9)
    assert span.attributes["gen_ai.request.id"] == "r1"
    assert span.attributes["mixeddim.kept_blocks"] == 5
