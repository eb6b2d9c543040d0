"""Metric values of one process, in files that prometheus_client adds up over processes."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

from mdkv_vllm.plugin.metrics.table import Metric

_OURS = "mixeddim-"
"""Keeps our files apart from those that prometheus_client writes for the same process."""


class Recorder:
    """The values that this process contributes; every other process has its own.

    prometheus_client decides once per process, when it is imported, whether its metrics live
    in files, and the API server must not change its mind. So values are written here, in the
    client's file format, and read with its public ``MultiProcessCollector``.

    Args:
        directory: the folder that the API servers read; None to keep values in memory alone.
        labels: ``model_name`` and ``engine``.
        ranks: tensor-parallel ranks of a stage, each of which holds its part of every block.
        rank: this process's number among them.
        tracing: whether vLLM exports OpenTelemetry spans.
        stage: this process's pipeline stage.
    """

    def __init__(
        self,
        directory: Path | None = None,
        labels: dict[str, str] | None = None,
        ranks: int = 1,
        rank: int = 0,
        tracing: bool = False,
        stage: int = 0,
    ) -> None:
        self.process_id = os.getpid()
        self.ranks, self.rank, self.stage, self.tracing = ranks, rank, stage, tracing
        self._directory = directory
        self.labels = labels or {}
        self._files: dict[str, MmapedDict] = {}
        self._keys: dict[tuple[str, tuple[str, ...]], str] = {}
        self._values: dict[str, float] = {}

    def declare(self, metric: Metric, **labels: str) -> None:
        """Make a metric visible, at zero."""
        if metric.kind != "histogram":
            self._write(metric, metric.exposed_name, labels, 0.0)
            return
        self._write(metric, f"{metric.name}_sum", labels, 0.0)
        for bound in (*metric.buckets, float("inf")):
            self._write(metric, f"{metric.name}_bucket", labels | _le(bound), 0.0)

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter or a gauge."""
        self._add(metric, metric.exposed_name, labels, amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._write(metric, metric.exposed_name, labels, value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Count a value in a histogram."""
        bounds = (*metric.buckets, float("inf"))
        bound = bounds[bisect_left(bounds, value)]
        self._add(metric, f"{metric.name}_bucket", labels | _le(bound), 1.0)
        self._add(metric, f"{metric.name}_sum", labels, value)

    def value(self, metric: Metric, sample: str | None = None, **labels: str) -> float:
        """A value as this process has it; 0 where there is none."""
        return self._values.get(self._key(metric, sample or metric.exposed_name, labels), 0.0)

    def _add(self, metric: Metric, sample: str, labels: dict[str, str], amount: float) -> None:
        before = self._values.get(self._key(metric, sample, labels), 0.0)
        self._write(metric, sample, labels, before + amount)

    def _write(self, metric: Metric, sample: str, labels: dict[str, str], value: float) -> None:
        key = self._key(metric, sample, labels)
        self._values[key] = value
        if self._directory is not None:
            self._file(metric.kind).write_value(key, value, time.time())

    def _key(self, metric: Metric, sample: str, labels: dict[str, str]) -> str:
        short = (sample, tuple(labels.values()))
        if short not in self._keys:
            full = self.labels | labels
            self._keys[short] = mmap_key(
                metric.name, sample, [*full], [*full.values()], metric.help
            )
        return self._keys[short]

    def _file(self, kind: str) -> MmapedDict:
        if kind not in self._files:
            assert self._directory is not None
            # A gauge is summed over the processes that are alive.
            prefix = "gauge_livesum" if kind == "gauge" else kind
            _remove_gauges_of_dead_processes(self._directory)
            path = self._directory / f"{prefix}_{_OURS}{self.process_id}.db"
            path.unlink(missing_ok=True)  # of a process that had this number before
            self._files[kind] = MmapedDict(str(path))
        return self._files[kind]


def _le(bound: float) -> dict[str, str]:
    return {"le": floatToGoString(bound)}


def _remove_gauges_of_dead_processes(directory: Path) -> None:
    """What a dead engine's requests held is free; its counters stay counted."""
    for path in directory.glob(f"gauge_*_{_OURS}*.db"):
        process_id = int(path.stem.rsplit("-", 1)[1])
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:
            continue


_recorder = Recorder()


def current_recorder() -> Recorder:
    """This process's recorder; one that keeps values in memory before there is another."""
    return _recorder


def install_recorder(recorder: Recorder) -> None:
    """Make a recorder this process's own, unless it has one of the same labels and place already.

    With one worker, scheduler and worker share a process and must share its files.
    """
    global _recorder
    identities = [
        (one.process_id, one.labels, one.stage, one.rank) for one in (_recorder, recorder)
    ]
    if identities[0] != identities[1]:
        _recorder = recorder
