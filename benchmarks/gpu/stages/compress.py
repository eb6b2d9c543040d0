"""Stage ``compress``: what compressing a prompt costs the host and the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from .. import compress_time
from ..device import device
from ..jobs import Ended, Job, Row
from ..loads import Heads
from . import Options, Stage, of_kind

LENGTHS = (4096, 32768, 2048)
"""Tokens of the prompts, in order of worth."""
SECONDS = 75


def prompt(model: compress_time.Model, tokens: int, seed: int) -> Iterator[Row]:
    """Time one length, compiling first."""
    generator = torch.Generator(device().where).manual_seed(seed)
    for timed in compress_time.time_compression(generator, model, (tokens,)):
        yield {"kind": "compression", "lines": timed.lines} | timed.as_json()


def jobs(options: Options) -> list[Job]:
    """One length after the other."""
    model, lengths = compress_time.LLAMA_8B, LENGTHS
    if options.rehearse:
        model, lengths = compress_time.Model(Heads("tiny", 1, 1, 64), 2, 32, 48), (100,)
    timing = [
        Job(f"compress {tokens} tokens", prompt, (model, tokens, options.seed), SECONDS)
        for tokens in lengths
    ]
    return [replace(job, alone=True) for job in timing]


def report(rows: Sequence[Row], _: Sequence[Ended]) -> list[str]:
    """The lines of every length."""
    return [line for row in of_kind(rows, "compression") for line in row["lines"]]


STAGE = Stage(235, jobs, report)
