"""The folder in which engine processes and API servers meet."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.logger import init_logger

from mdkv_vllm.plugin.metrics.recorder import Recorder, install_recorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM shows only what loggers below its own name say.
logger = init_logger(f"vllm.{__name__}")

VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""Set by vLLM where it has several API servers, and read by all of them."""
OWN_DIRECTORY = "MIXEDDIM_METRICS_DIR"
"""Set by :func:`expose_metrics` for the child processes of a single API server."""

_own_directory: tempfile.TemporaryDirectory[str] | None = None


def expose_metrics() -> None:
    """Have this process's ``/metrics`` show what engine processes record; idempotent.

    A single API server keeps vLLM's metrics in its memory, and setting vLLM's variable would
    make it look for them in files. It gets a folder for ours alone, and a collector.
    """
    global _own_directory
    if VLLM_DIRECTORY in os.environ or _own_directory is not None:
        return
    if OWN_DIRECTORY in os.environ and multiprocessing.parent_process() is not None:
        return  # an engine process of the server that set it
    _own_directory = tempfile.TemporaryDirectory(prefix="mixeddim-metrics-")
    os.environ[OWN_DIRECTORY] = _own_directory.name
    MultiProcessCollector(REGISTRY, _own_directory.name)
    logger.info("mixeddim: metrics of the engine's processes meet in %s", _own_directory.name)


def start_recording(vllm_config: VllmConfig, rank: int = 0) -> None:
    """Give this engine process its recorder; idempotent.

    Args:
        vllm_config: vLLM's configuration.
        rank: the worker's number; 0 for the scheduler.
    """
    folder = os.environ.get(VLLM_DIRECTORY) or os.environ.get(OWN_DIRECTORY)
    parallel = vllm_config.parallel_config
    stage, rank = divmod(rank, parallel.tensor_parallel_size)
    install_recorder(
        Recorder(
            Path(folder) if folder else None,
            {
                "model_name": vllm_config.model_config.served_model_name,
                "engine": str(parallel.data_parallel_index),
            },
            ranks=parallel.tensor_parallel_size,
            rank=rank,
            stage=stage,
            tracing=vllm_config.observability_config.otlp_traces_endpoint is not None,
        )
    )
