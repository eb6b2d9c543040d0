"""Stage ``full``: everything that there is, for a machine without a short limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..jobs import Ended, Job, Row
from . import Options, Stage, check, compress, decode, profile, sanitize

PARTS = (check.STAGE, sanitize.STAGE, compress.STAGE, decode.STAGE, profile.STAGE)


def jobs(options: Options) -> list[Job]:
    """Those of every stage, each once, with every load and budget."""
    options = replace(options, everything=not options.rehearse)
    return list({job.name: job for stage in PARTS for job in stage.jobs(options)}.values())


def report(rows: Sequence[Row], ended: Sequence[Ended]) -> list[str]:
    """The reports of every stage."""
    return [line for stage in PARTS for line in stage.report(rows, ended)]


STAGE = Stage(3600, jobs, report)
