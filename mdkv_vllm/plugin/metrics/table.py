"""Every metric: its name, its kind, its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COMMON_LABELS = ("model_name", "engine")
"""Labels of every metric, as vLLM's own have them."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without what Prometheus appends (``_total``, ``_bucket``).
        kind: Prometheus' type.
        help: one line for ``/metrics``.
        labels: labels beside ``model_name`` and ``engine``.
        buckets: upper bounds of a histogram, without infinity.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exposed_name(self) -> str:
        """The name to query; a histogram's has ``_bucket``, ``_sum`` and ``_count`` appended."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


PROMPTS_COMPRESSED = Metric(
    "mixeddim:prompts_compressed",
    "counter",
    "Prompts whose first segment was compressed; again after a preemption.",
)
SEGMENTS_COMPRESSED = Metric(
    "mixeddim:segments_compressed",
    "counter",
    "Segments whose blocks before their lease were given back, of prompts and of answers.",
    ("part",),
)
SEGMENTS_PUBLISHED = Metric(
    "mixeddim:segments_published",
    "counter",
    "Compressed segments that other requests may read since.",
)
SEGMENTS_HIT = Metric(
    "mixeddim:segments_hit",
    "counter",
    "Compressed segments of others that a scheduled request reads instead of computing them.",
)
SEGMENTS_EVICTED = Metric(
    "mixeddim:segments_evicted",
    "counter",
    "Published segments that were found to be evicted; noticed when somebody looks for them.",
)
SHARED_TOKENS = Metric(
    "mixeddim:shared_prefix_tokens",
    "counter",
    "Prompt tokens that were read from compressed segments of others.",
)
PROMPTS_SKIPPED = Metric(
    "mixeddim:prompts_skipped",
    "counter",
    "Requests left uncompressed, by reason.",
    ("reason",),
)
PROMPT_BUDGET = Metric(
    "mixeddim:prompt_budget",
    "histogram",
    "Share of its KV bytes that each prompt was to keep; 1 where it was left alone.",
    buckets=(0.03125, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0),
)
BLOCKS_RETURNED = Metric(
    "mixeddim:blocks_returned",
    "counter",
    "KV cache blocks that compression gave back to vLLM's pool.",
)
FULL_BYTES = Metric(
    "mixeddim:full_bytes",
    "gauge",
    "KV bytes that the resident requests would hold without compression, over all ranks.",
)
KEPT_BYTES = Metric(
    "mixeddim:kept_bytes",
    "gauge",
    "KV bytes that the resident requests hold, over all ranks.",
)
COMPRESSED_TOKENS = Metric(
    "mixeddim:compressed_tokens",
    "counter",
    "Tokens of prompts and of answers by the format they got, once per layer and KV head.",
    ("format", "part"),
)
LEASE_BYTES = Metric(
    "mixeddim:lease_bytes",
    "gauge",
    "Bytes of the leases of resident requests, over all ranks.",
)
LEASE_USED_BYTES = Metric(
    "mixeddim:lease_used_bytes",
    "gauge",
    "Bytes of those leases that hold something; the rest is rounding to pages.",
)
COMPRESSION_SECONDS = Metric(
    "mixeddim:compression_seconds",
    "histogram",
    "Time that the compression of one segment took.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
CONFIG_INFO = Metric(
    "mixeddim:config_info",
    "gauge",
    "The configuration in force, in labels; always 1.",
    (
        "compression",
        "budget",
        "window",
        "formats",
        "loss",
        "basis",
        "heads",
        "min_prompt_tokens",
        "segments",
        "segment_tokens",
        "shared_prefixes",
    ),
)

METRICS = (
    PROMPTS_COMPRESSED,
    SEGMENTS_COMPRESSED,
    SEGMENTS_PUBLISHED,
    SEGMENTS_HIT,
    SEGMENTS_EVICTED,
    SHARED_TOKENS,
    PROMPTS_SKIPPED,
    PROMPT_BUDGET,
    BLOCKS_RETURNED,
    FULL_BYTES,
    KEPT_BYTES,
    COMPRESSED_TOKENS,
    LEASE_BYTES,
    LEASE_USED_BYTES,
    COMPRESSION_SECONDS,
    CONFIG_INFO,
)
