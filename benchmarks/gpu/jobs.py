"""Jobs, each in a process of its own with a time limit, under one deadline.

A kernel that raises, hangs or aborts costs its own job and nothing else. Rows arrive when they are
made.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from . import plant

Row = dict[str, Any]
"""What a job tells: numbers, strings, lists and dictionaries of them."""

TAIL_LINES = 25
"""Of a job's output, kept where it did not end well."""
EXIT_SECONDS = 5
"""That a process may take to end when it has told everything."""
PRELOADED = [
    "torch",
    "triton",
    "benchmarks.gpu.call",
    "benchmarks.gpu.check",
    "benchmarks.gpu.compress_check",
]
"""Imported once, in the process that jobs are forked from; none of it touches the GPU."""


@dataclass(frozen=True)
class Job:
    """A part of a stage.

    Attributes:
        name: unique in a run.
        function: called in the job's process; yields rows. Picklable.
        arguments: its arguments.
        seconds: its time limit.
        after: names of jobs that have to end first, well or not.
        alone: whether nothing else may run beside it, as for timing.
        on_failure: jobs that follow where it did not end well.
    """

    name: str
    function: Callable[..., Iterable[Row]]
    arguments: tuple[Any, ...] = ()
    seconds: float = 60
    after: tuple[str, ...] = ()
    alone: bool = False
    on_failure: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        job: which.
        state: ``ok``, or what went wrong in a few words.
        seconds: how long it ran.
        output: the end of what it printed, or its traceback; empty where all is well.
    """

    job: Job
    state: str
    seconds: float = 0.0
    output: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did all that it was to do."""
        return self.state == "ok"


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    rows: Connection
    output: IO[bytes]
    started: float
    limit: float
    error: str = ""
    done: bool = False


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    deadline: float,
    plants: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[Job, Row] | Ended]:
    """Run jobs, the first that are ready first, some at once.

    Args:
        jobs: what to run, in order of worth.
        workers: processes at once.
        deadline: in seconds of ``time.monotonic``: nothing starts after it, and whatever still runs
            is ended.
        plants: faults for the kernels of jobs whose name contains the key; see plant.py.

    Yields:
        Each row with its job when it arrives; how a job ended, after its rows.
    """
    names = {job.name for job in jobs}
    for job in jobs:
        assert names.issuperset(job.after), f"{job.name} waits for a job that is not there"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = list(jobs), list[_Running]()
    ended: set[str] = set()
    try:
        while waiting or running:
            if time.monotonic() > deadline:
                for job in waiting:
                    yield Ended(job, "not started: no time left")
                waiting = []
            while job := _next_ready(waiting, running, ended, workers):
                waiting.remove(job)
                running.append(_start(context, job, deadline, _planted(job, plants)))
            for one in _woken(running):
                yield from ((one.job, row) for row in _received(one))
                end = _end(one)
                if end is None:
                    continue
                running.remove(one)
                ended.add(one.job.name)
                if not end.ok:
                    waiting[:0] = one.job.on_failure
                yield end
    finally:
        for one in running:
            _kill(one.process)


def _next_ready(
    waiting: Sequence[Job], running: Sequence[_Running], ended: set[str], workers: int
) -> Job | None:
    if len(running) >= workers or any(one.job.alone for one in running):
        return None
    for job in waiting:
        if ended.issuperset(job.after):
            return job if not (job.alone and running) else None
    return None


def _planted(job: Job, plants: Mapping[str, str]) -> str:
    return next((fault for name, fault in plants.items() if name in job.name), "")


def _start(context: Any, job: Job, deadline: float, fault: str) -> _Running:  # noqa: ANN401
    receiver, sender = context.Pipe(duplex=False)
    output = tempfile.NamedTemporaryFile(prefix="job-")  # noqa: SIM115 (closed when the job ends)
    process = context.Process(target=_work, args=(job, sender, output.name, fault))
    process.start()
    sender.close()
    now = time.monotonic()
    limit = now + min(job.seconds, max(deadline - now, 0))
    return _Running(job, process, receiver, output, now, limit)


def _work(job: Job, rows: Connection, output: str, fault: str) -> None:
    """The job's process: its own group, so that what it starts ends with it."""
    os.setsid()
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    plant.arm(fault)
    error = ""
    try:
        for row in job.function(*job.arguments):
            rows.send(row)
    except BaseException as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    sys.stdout.flush()
    sys.stderr.flush()
    rows.send(error)
    rows.close()
    # Without clean-up: a broken CUDA context makes that hang.
    os._exit(0)


def _woken(running: Sequence[_Running]) -> list[_Running]:
    """Those with rows, at their end, or over their limit."""
    if not running:
        return []
    first = min(one.limit for one in running)
    handles = [one.rows for one in running] + [one.process.sentinel for one in running]
    ready = set(wait(handles, max(0.0, first - time.monotonic())))
    now = time.monotonic()
    return [
        one
        for one in running
        if one.rows in ready or one.process.sentinel in ready or now >= one.limit
    ]


def _received(one: _Running) -> Iterator[Row]:
    while not one.done and one.rows.poll():
        try:
            row = one.rows.recv()
        except (EOFError, OSError):
            one.done = True
            return
        if isinstance(row, dict):
            yield row
        else:
            one.done, one.error = True, row


def _end(one: _Running) -> Ended | None:
    """How it ended, if it has; ends it where its time is up."""
    late = time.monotonic() >= one.limit
    if one.process.is_alive() and not one.done and not late:
        return None
    if one.done:
        one.process.join(EXIT_SECONDS)
    status = one.process.exitcode
    _kill(one.process)
    seconds = time.monotonic() - one.started
    one.rows.close()
    lines = Path(one.output.name).read_text(errors="replace").splitlines()
    one.output.close()
    output = "\n".join(lines[-TAIL_LINES:])
    if one.error:
        return Ended(one.job, f"failed: {one.error.splitlines()[0][:300]}", seconds, output)
    if one.done and not status:
        return Ended(one.job, "ok", seconds)
    if status is None:
        return Ended(one.job, f"ended after {seconds:.0f} s, its limit", seconds, output)
    return Ended(one.job, f"died: {_status(status)}", seconds, output)


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _kill(process: BaseProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join(EXIT_SECONDS)
