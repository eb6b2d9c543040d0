"""A long answer, with compression and without: blocks in use while it grows."""

from __future__ import annotations

import os
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from mdkv_vllm.demo.client import BlockMeter, report_of, stream

PROMPT = (
    "<|im_start|>user\nWrite a long story about a lighthouse keeper, her three children and an old "
    "map.<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER_TOKENS = 1600
ROOM_TOKENS = 64
"""Of the model's length, for the prompt."""
ROWS = 12
BAR_WIDTH = 24


@dataclass(frozen=True)
class Growth:
    """A server's blocks in use while an answer grew.

    Attributes:
        blocks: ``(generated tokens, cache blocks in use)`` in the order of time.
        compressed: whether the server reported that it compressed a part of the answer.
        tokens_per_second: after the first token.
    """

    blocks: list[tuple[int, int]]
    compressed: bool
    tokens_per_second: float

    def at(self, tokens: int) -> int:
        """Blocks in use when so many tokens had been generated; 0 if nothing was measured."""
        if not self.blocks:
            return 0
        index = bisect_left(self.blocks, tokens, key=lambda sample: sample[0])
        return self.blocks[min(index, len(self.blocks) - 1)][1]


def show_answer(url: str, model: str, max_model_len: int, console: Console) -> None:
    """Have a long answer written with compression, then without, and plot the blocks in use.

    Args:
        url: the server.
        model: model name.
        max_model_len: tokens that prompt and answer may have.
        console: where to print.
    """
    tokens = min(ANSWER_TOKENS, max_model_len - ROOM_TOKENS)
    console.print(f"\n[bold]An answer of {tokens:,} tokens[/bold], written twice")
    runs = {}
    for name, extra in (("compressed", {}), ("compression off", {"mixeddim_budget": 1.0})):
        with console.status(name):
            runs[name] = _write(url, model, tokens, extra)
    console.print(answer_plot(runs, tokens))
    if not runs["compressed"].compressed:
        console.print(
            "This server compresses no answers: its model has no head scores, or it is set so.",
            highlight=False,
        )


def answer_plot(runs: dict[str, Growth], tokens: int) -> Table:
    """Bars of blocks in use, one row for each part of the answer."""
    marks = [tokens * (row + 1) // ROWS for row in range(ROWS)]
    most = max((run.at(mark) for run in runs.values() for mark in marks), default=0) or 1
    table = Table(title="cache blocks in use while it was written")
    table.add_column("tokens", justify="right")
    for name in runs:
        table.add_column(name)
    for mark in marks:
        cells = [_bar(run.at(mark), most) for run in runs.values()]
        table.add_row(f"{mark:,}", *cells)
    table.add_row("per second", *(f"{run.tokens_per_second:.1f}" for run in runs.values()))
    return table


def _bar(blocks: int, most: int) -> Table:
    cell = Table.grid(padding=(0, 1))
    cell.add_column(width=BAR_WIDTH)
    cell.add_column(justify="right", width=len(str(most)))
    cell.add_row(Bar(most, 0, blocks, width=BAR_WIDTH), str(blocks))
    return cell


def _write(url: str, model: str, tokens: int, extra: dict[str, float]) -> Growth:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": os.urandom(8).hex(),
        "vllm_xargs": extra,
    }
    # Without text of its own (half a character) a token still is an event.
    times, request_id = [], ""
    with BlockMeter(url) as meter:
        for event in stream(f"{url}/v1/completions", body):
            request_id = event["id"]
            times += [time.perf_counter()] * len(event["choices"])
    blocks = [(bisect_right(times, at), used) for at, used in meter.samples if at < times[-1]]
    rate = (len(times) - 1) / (times[-1] - times[0])
    compressed = bool(report_of(url, request_id, "answer"))
    return Growth([sample for sample in blocks if sample[0]], compressed, rate)
