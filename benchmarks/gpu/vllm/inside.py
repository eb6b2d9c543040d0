"""What try_bundle.py runs in its environment: a line per part, exit status 1 where one fails."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

GIGABYTE = 1 << 30


def answer_for_nvml() -> None:
    """One H100, as NVML would tell."""
    from vllm.third_party import pynvml

    memory = SimpleNamespace(total=80 * GIGABYTE, free=79 * GIGABYTE, used=GIGABYTE)
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlSystemGetDriverVersion": "580.0",
    }
    for name, answer in answers.items():
        assert hasattr(pynvml, name), name
        setattr(pynvml, name, lambda *_, told=answer: told)


def activate_triton() -> None:
    """Let Triton's NVIDIA driver be there, which vLLM asks before it takes Triton."""
    from triton.backends import backends

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)


def versions() -> str:
    """Of what the machine has."""
    import torch
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def extensions() -> str:
    """Load vLLM's; every symbol has to be there."""
    for name in sys.argv[1:]:
        importlib.import_module(name.removesuffix(".abi3.so").replace("/", "."))
    return f"{len(sys.argv) - 1} load"


def platform() -> str:
    """The one that vLLM chooses."""
    from vllm.platforms import current_platform

    name = type(current_platform).__name__
    assert name == "MixedDimCudaPlatform", name
    return name


def configurations() -> str:
    """Of every engine of serve.py; none says that something is not supported."""
    from vllm import EngineArgs

    from benchmarks.gpu.vllm.engines import H100, options_of
    from benchmarks.gpu.vllm.serve import engines

    model = Path(tempfile.mkdtemp(prefix="model-"))
    told = []
    for engine in engines(rehearse=False):
        config = EngineArgs(**options_of(engine, H100, model)).create_engine_config()
        told.append(f"{engine.name}: {config.attention_config.backend or 'automatic'}")
    return "; ".join(told)


def imports() -> str:
    """What a worker runs."""
    names = (
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.worker.gpu.model_runner",
        "vllm.model_executor.models.llama",
        "vllm.v1.attention.backends.flash_attn",
        "mdkv_vllm.plugin.backend",
        "mdkv_vllm.plugin.cuda_worker",
        "mdkv_vllm.plugin.prefill.flash",
        "mdkv_vllm.kernels.triton.decode",
        "mdkv_vllm.kernels.triton.compress",
    )
    for name in names:
        importlib.import_module(name)
    return f"{len(names)} modules"


def kernels() -> str:
    """The CUDA library of the bundle has this package's interface."""
    from mdkv_vllm.kernels.cuda import library as cuda

    cuda.library()
    return f"interface {cuda.ABI}"


def flash_attention() -> str:
    """The kit's calls of FlashAttention 3 have the arguments of its operations."""
    import torch

    from benchmarks.gpu.baselines import FLASH_ATTENTION_3, FullCache, vllm_flash_attention_3
    from benchmarks.gpu.loads import LLAMA, Load

    path = importlib.import_module("vllm.vllm_flash_attn._vllm_fa3_C").__file__
    assert path is not None
    os.environ[FLASH_ATTENTION_3] = path
    cache = FullCache.random(Load(LLAMA, 2, 64), 1, torch.Generator())
    operations = torch.ops._vllm_fa3_C
    schedule = operations.get_scheduler_metadata

    def scheduled(*arguments: object) -> torch.Tensor:
        _reaches_the_device(schedule, *arguments)
        return torch.zeros(1, dtype=torch.int32)

    operations.get_scheduler_metadata = scheduled
    for paged in (False, True):
        _reaches_the_device(vllm_flash_attention_3(cache, paged), 0)
    return "contiguous and paged"


def _reaches_the_device(operation: Callable[..., object], *arguments: object) -> None:
    """Arguments are looked at before it is seen that there is no kernel for the CPU."""
    try:
        operation(*arguments)
    except NotImplementedError as error:
        if "'CPU' backend" not in str(error):
            raise
        return
    raise AssertionError("ran on a CPU")


PARTS: tuple[Callable[[], str], ...] = (
    versions,
    extensions,
    platform,
    configurations,
    imports,
    kernels,
    flash_attention,
)


def main() -> int:
    """Try every part; the exit status."""
    activate_triton()  # vLLM asks when it is imported
    answer_for_nvml()
    failed = 0
    for part in PARTS:
        try:
            print(f"{part.__name__}: {part()}", flush=True)
        except Exception:
            failed += 1
            print(f"{part.__name__}: FAILED\n{traceback.format_exc()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
