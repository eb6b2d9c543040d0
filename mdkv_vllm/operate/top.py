"""``mdkv top``: a running server in the terminal."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mdkv_vllm.core.segment import PARTS
from mdkv_vllm.operate.scrape import Scrape, ServerAddress

_BAR = 24
_MOST_REQUESTS = 20
"""Requests listed; more do not fit on a screen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of ``mdkv top``."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"), metavar="KEY",
        help="the server's, for the list of requests (default: $VLLM_API_KEY)",
    )  # fmt: skip
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="default: %(default)g"
    )
    parser.add_argument("--once", action="store_true", help="print one interval and end")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Show the server until interrupted, or once.

    Raises:
        ValueError: the interval is not above 0, or the server has no mixeddim metrics.
        OSError: nothing answers.
    """
    if not options.interval > 0:
        raise ValueError(f"--interval is {options.interval:g}; allowed are numbers above 0")
    server = ServerAddress(options.url.rstrip("/"), options.api_key)
    console = Console()
    before = server.scrape()
    if options.once:
        time.sleep(options.interval)
        console.print(view(before, server.scrape(), server.status()))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(options.interval)
                now = server.scrape()
                live.update(view(before, now, server.status()), refresh=True)
                before = now
        except KeyboardInterrupt:
            return


def view(before: Scrape, now: Scrape, status: dict[str, Any] | None) -> Group:
    """What happened between two scrapes, and what is held now.

    Args:
        before: the earlier scrape.
        now: the later one.
        status: the server's status, None where it is off.
    """
    info = now.labels("mixeddim:config_info")
    title = Text(
        f"{info['model_name']}   compression {info['compression']}, budget {info['budget']}, "
        f"window {info['window']}, loss {info['loss']}, heads {info['heads']}, "
        f"basis {info['basis']}"
    )
    parts: list[Text | Table] = [title, _numbers(before, now), _formats(now)]
    if status is not None:
        parts.append(_requests(status["requests"]))
    return Group(*parts)


def _numbers(before: Scrape, now: Scrape) -> Table:
    def rate(name: str) -> float:
        return (now.total(name) - before.total(name)) / (now.at - before.at)

    full, kept = now.total("mixeddim:full_bytes"), now.total("mixeddim:kept_bytes")
    leased, used = now.total("mixeddim:lease_bytes"), now.total("mixeddim:lease_used_bytes")
    seconds = now.total("mixeddim:compression_seconds_sum")
    compressions = now.total("mixeddim:compression_seconds_count")
    engines = len(now.samples.get("vllm:kv_cache_usage_perc", ())) or 1
    parts = now.by_label("mixeddim:segments_compressed_total", "part")
    segments = {part: parts.get(part, 0.0) for part in PARTS}
    skipped = now.by_label("mixeddim:prompts_skipped_total", "reason")
    reasons = ", ".join(f"{name} {count:.0f}" for name, count in skipped.items() if count)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in (
        (
            "requests",
            f"{now.total('vllm:num_requests_running'):.0f} running, "
            f"{now.total('vllm:num_requests_waiting'):.0f} waiting, "
            f"{now.total('vllm:num_preemptions_total'):.0f} preemptions so far",
        ),
        (
            "tokens per second",
            f"{rate('vllm:prompt_tokens_total'):.1f} prompt, "
            f"{rate('vllm:generation_tokens_total'):.1f} generated",
        ),
        (
            "KV bytes",
            f"{_size(kept)} held of {_size(full)} at full size{_percent(kept, full)}",
        ),
        ("KV cache", _bar(now.total("vllm:kv_cache_usage_perc") / engines)),
        ("leases", f"{_size(used)} used of {_size(leased)}{_percent(used, leased)}"),
        (
            "prompts",
            f"{now.total('mixeddim:prompts_compressed_total'):.0f} compressed, "
            f"{sum(skipped.values()):.0f} skipped" + (f" ({reasons})" if reasons else ""),
        ),
        (
            "segments",
            f"{segments['prompt']:.0f} of prompts and {segments['answer']:.0f} of answers "
            "compressed",
        ),
        (
            "shared prefixes",
            f"{now.total('mixeddim:segments_hit_total'):.0f} segments read of "
            f"{now.total('mixeddim:segments_published_total'):.0f} published, "
            f"{now.total('mixeddim:segments_evicted_total'):.0f} seen evicted; "
            f"{now.total('mixeddim:shared_prefix_tokens_total'):,.0f} prompt tokens not computed",
        ),
        ("blocks given back", f"{now.total('mixeddim:blocks_returned_total'):.0f}"),
        (
            "compression",
            f"{seconds / compressions:.3f} s on average" if compressions else "none yet",
        ),
    ):
        table.add_row(name, Text(text))
    return table


def _formats(now: Scrape) -> Table:
    tokens = now.by_label("mixeddim:compressed_tokens_total", "format")
    total = sum(tokens.values())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, count in tokens.items():
        table.add_row(f"as {name}", Text(_bar(count / total if total else 0.0)))
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{len(requests)} requests on the first engine", title_justify="left")
    table.add_column("request")
    table.add_column("prompt tokens", justify="right")
    table.add_column("share of prompt kept once compressed", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("segments", justify="right")
    for request in requests[:_MOST_REQUESTS]:
        table.add_row(
            Text(request["request_id"]),
            f"{request['prompt_tokens']:,}",
            f"{request['planned_share']:.1%}",
            f"{request['computed_tokens']:,}",
            str(request["compressed_segments"]),
        )
    return table


def _bar(share: float) -> str:
    return "█" * round(share * _BAR) + "·" * (_BAR - round(share * _BAR)) + f" {share:.1%}"


def _percent(part: float, whole: float) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
